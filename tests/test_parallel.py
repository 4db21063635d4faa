"""Training over several processes equals training in one: losses, weights, reference, evaluation, checkpoints."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from config.settings import CheckpointSettings, LikelihoodLossSettings, PreferenceLossSettings, TrainerSettings
from tests.ranks import run_ranks
from tests.tiny_models import SUPPORTED, tiny_model
from tests.tiny_runs import tiny_settings, tiny_trainer
from trainers.parallel import launch
from trainers.run_dir import RunDir

LOSSES = {
    "dpo": PreferenceLossSettings(name="dpo", nll_weight=0.3),
    "sft": LikelihoodLossSettings(name="sft"),
    "reverse": LikelihoodLossSettings(name="reverse", reduction="token_mean"),
}
LAYOUTS = {  # name -> processes, replicas
    "fsdp 2": (2, 1),
    "fsdp 4": (4, 1),
    "hsdp 2x2": (4, 2),
}
STEPS = 20


def settings_of(loss: str, accumulation: int, processes: int, replicas: int, **changes):
    """20 steps over 46 rows of unequal lengths in batches of 5: the last of an epoch has 1 row, fewer than ranks."""
    name = "BasicTrainer" if processes == 1 else "FSDPTrainer"
    settings = tiny_settings(
        loss=LOSSES[loss], batch_size=5, eval_batch_size=5, n_epochs=2, optimizer="AdamW", lr=3e-4,
        gradient_accumulation_steps=accumulation, eval_every=60,
        trainer=TrainerSettings(name=name, num_processes=processes, num_replicas=replicas),
    )  # fmt: skip
    return replace(settings, **changes)


def train(layout, folder: Path, run_name: str, settings, model: str = "llama"):
    path = folder / run_name
    opened: list[RunDir] = []
    layout.on_main(lambda: opened.append(RunDir.open(path, config=asdict(settings), manifest={})))
    with opened[0] if layout.is_main else RunDir(path, None) as run:
        tiny_trainer(folder, layout, run, settings, model=model, num_rows=46).train()


def start(folder: Path, run_name: str, settings, model: str = "llama") -> None:
    if settings.trainer.name == "BasicTrainer":
        launch(lambda layout: train(layout, folder, run_name, settings, model), settings)
    else:
        run_ranks(train, settings.trainer.num_processes, settings, folder, run_name, settings, model)


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [value for row in rows for name, value in row.items() if name in ("loss/train", "loss/eval")]


def weights(run: Path) -> torch.Tensor:
    tensors = load_file(run / "LATEST" / "model" / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_twenty_steps_equal_those_of_one_process(tmp_path, loss, accumulation):
    start(tmp_path, "one", settings_of(loss, accumulation, 1, 1))
    expected, one = losses(tmp_path / "one"), weights(tmp_path / "one")
    assert len(expected) == STEPS + 3
    for name, (processes, replicas) in LAYOUTS.items():
        start(tmp_path, name, settings_of(loss, accumulation, processes, replicas))
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-5), name
        difference = (weights(tmp_path / name) - one).abs()
        print(f"{loss} {accumulation} {name}: mean {difference.mean():.2e} largest {difference.max():.2e}")
        assert difference.mean() < 1e-6, name
