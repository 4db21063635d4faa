"""What a device is built for, and what a step asks of it."""

import pytest
import torch

from tests.tiny_models import VOCABULARY, tiny_model
from trainers.kernels.flops import emulates_bfloat16, head_flops_per_target, peak_flops, training_flops_per_token


@pytest.mark.parametrize(
    ("text", "emulates"),
    [
        ("flags\t\t: fpu avx512f avx512_vnni\n", True),
        ("flags\t\t: fpu avx512f avx512_bf16\n", False),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", False),
    ],
)
def test_a_cpu_without_the_instructions_emulates_bfloat16(tmp_path, text, emulates):
    (tmp_path / "cpuinfo").write_text(text)
    assert emulates_bfloat16(torch.device("cpu"), tmp_path / "cpuinfo") == emulates


def test_where_nothing_is_known_nothing_is_said(tmp_path):
    (tmp_path / "cpuinfo").write_text("flags : fpu\n")
    assert not emulates_bfloat16(torch.device("cpu"), tmp_path / "none")
    assert not emulates_bfloat16(torch.device("cuda"), tmp_path / "cpuinfo")


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 NVL", 836), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 836), ("NVIDIA GH200 480GB", 989), ("NVIDIA GeForce GTX 1080", None),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_its_name(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_flops(torch.device("cuda"))
    assert found == (None if teraflops is None else pytest.approx(1e12 * teraflops, rel=1e-6))


@pytest.mark.parametrize("name", ["llama", "qwen2_tied", "gptj"])
def test_head_and_blocks_are_all_but_the_input_embedding(name):
    """6 FLOPs for each parameter; a tied head counts as one, although it is the input embedding, too."""
    model = tiny_model(name)
    table = VOCABULARY * model.config.hidden_size
    assert head_flops_per_target(model) == 6 * table
    own_head = 0 if name == "qwen2_tied" else 6 * table
    everything = 6 * sum(parameter.numel() for parameter in model.parameters())
    assert training_flops_per_token(model) + 6 * table + own_head == everything
