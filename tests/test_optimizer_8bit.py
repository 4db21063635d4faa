"""AdamW with a state of 8 bits (torchao): its bytes, its checkpoints, and how any quantised state is written."""

import shutil
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaConfig, LlamaForCausalLM

from config.settings import CheckpointSettings, DPOSettings, TrainerSettings
from tests.test_errors_loss import faults
from tests.tiny_models import GROUPED
from tests.tiny_runs import tiny_settings, tiny_trainer
from trainers.distributed.launch import launch
from trainers.estimates import checkpoint_bytes
from trainers.optimizers import build_optimizer, set_learning_rate
from trainers.run.data_only import load_data_only
from trainers.run.run_dir import RunDir
from trainers.run.state import plain_state, wrapped_state

COMPILE = torch.compile
SETTINGS = tiny_settings(
    optimizer="AdamW8bit", optimizer_args={"weight_decay": 0.1}, n_epochs=2,
    checkpoint=CheckpointSettings(every_examples=20),
)  # fmt: skip


@pytest.fixture
def torchao(monkeypatch):
    """Its steps as Python has them: what a compiler makes of them is the compiler's."""
    pytest.importorskip("torchao.optim", reason="pip install --no-deps 'torchao>=0.18'")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def model() -> LlamaForCausalLM:
    """Matrices of 4096 values or more, the least that torchao quantises."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**GROUPED, "hidden_size": 64, "num_hidden_layers": 1}))


def states(trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Codes and scales, or the values of what is too small for 8 bits, copied."""
    found = {}
    for number, state in enumerate(trainer.optimizer.state.values()):
        for name, value in state.items():
            parts = plain_state({name: value})[name]
            parts = parts if isinstance(parts, dict) else {"": parts}
            found[f"{number} {name}"] = {part: tensor.clone() for part, tensor in parts.items()}
    return found


def run(folder: Path, name: str) -> dict:
    """One command: the optimizer's state before its first step and at its end, its bytes, the weights."""
    kept = {}

    def work(layout):
        with RunDir.open(folder / name, config=asdict(SETTINGS), manifest={}) as opened:
            trainer = tiny_trainer(folder, layout, opened, SETTINGS, model=model())
            kept["start"] = states(trainer)
            trainer.train()
            kept.update(end=states(trainer), bytes=checkpoint_bytes(trainer)[1])

    launch(work, SETTINGS)
    return {**kept, "weights": load_file(folder / name / "LATEST" / "model" / "model.safetensors")}


@pytest.mark.usefixtures("torchao")
def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path):
    """With saves while it trains on. Two bytes a parameter, and two scales a block of 256."""
    whole, cut = run(tmp_path, "whole"), tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut, symlinks=True)
    folders = sorted((cut / "checkpoints").glob("step-*"), key=lambda one: int(one.name.split("-")[1]))
    shutil.rmtree(folders[-1])
    (cut / "LATEST").unlink()
    again = run(tmp_path, "cut")
    assert set(whole["end"]["0 exp_avg"]) == {"codes", "scale", "qmap"}
    assert any(parts["codes"].any() for parts in again["start"].values() if "codes" in parts)
    for name, parts in whole["end"].items():
        assert all(torch.equal(again["end"][name][part], value) for part, value in parts.items()), name
    for name, value in whole["weights"].items():
        assert torch.equal(again["weights"][name], value), name
    table = whole["weights"]["model.embed_tokens.weight"].numel()  # the first parameter
    size = {name: sum(one.nbytes for one in parts.values()) for name, parts in whole["end"].items()}
    assert size["0 exp_avg"] == size["0 exp_avg_sq"] == table + 4 * table // 256 + 4 * 256  # and a table of all codes
    assert whole["bytes"] == sum(size.values())


def moved(name: str) -> torch.Tensor:
    """How far 20 steps with other learning rates move a matrix."""
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(start.clone())
    optimizer = build_optimizer([parameter], tiny_settings(optimizer=name, optimizer_args={"weight_decay": 0.1}))
    for step in range(20):
        parameter.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step)) + 1
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        optimizer.step()
    return parameter.detach() - start


@pytest.mark.usefixtures("torchao")
def test_it_is_adamw_but_for_the_rounding():
    """Against torch's own, from the same gradients: a step is off by less than 2% of the learning rate's reach."""
    expected = moved("AdamW")
    assert (moved("AdamW8bit") - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.usefixtures("torchao")
def test_the_compiled_step_is_the_same(monkeypatch):
    """One graph for all learning rates; what Inductor makes of it is Inductor's."""
    expected, compilations = moved("AdamW8bit"), CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=compilations))
    assert torch.equal(moved("AdamW8bit"), expected)
    assert compilations.frame_count == 1


def test_any_wrapping_tensor_is_written_as_its_parts_and_read_into_them(tmp_path):
    """With torch's own example of such a class; numbers beside it come back, too."""

    def state(*values):
        a, b, plain = (torch.full((2, 3), value) for value in values)
        return {"weight": {"exp_avg": TwoTensor(a, b), "plain": plain, "count": values[0]}, "groups": [{"lr": 0.1}]}

    saved, own = state(1.0, 2.0, 3.0), state(0.0, 0.0, 0.0)
    assert plain_state(saved)["weight"].keys() == saved["weight"].keys()
    dcp.save(plain_state(saved), checkpoint_id=tmp_path, no_dist=True)
    plain = plain_state(own)
    load_data_only(plain, tmp_path)
    found = wrapped_state(plain, own)["weight"]
    assert found["exp_avg"] is own["weight"]["exp_avg"]
    assert [found["exp_avg"].a.mean().item(), found["exp_avg"].b.mean().item()] == [1.0, 2.0]
    assert (found["plain"].mean().item(), found["count"]) == (3.0, 1.0)


@pytest.mark.usefixtures("torchao")
def test_sharded_weights_are_refused(tmp_path):
    changes = {"optimizer": "AdamW8bit", "trainer": TrainerSettings(name="FSDPTrainer")}
    (found,) = faults(tmp_path, DPOSettings(), changes=changes)
    assert "its 8-bit state is not sharded; write trainer=BasicTrainer" in found


def test_without_torchao_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    (found,) = faults(tmp_path, DPOSettings(), changes={"optimizer": "AdamW8bit"})
    assert "optimizer=AdamW8bit: it needs torchao, which cannot be imported" in found
    assert "pip install --no-deps 'torchao>=0.18'" in found
