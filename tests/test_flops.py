"""Whether a CPU has bfloat16, by what the kernel says of it."""

import pytest
import torch

from trainers.kernels.flops import emulates_bfloat16


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
