"""`experiment=[RECIPE,MACHINE]`: a machine behind a recipe composes, and changes where and not what is trained."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from config.checks_train import check_train
from config.errors import UserError
from config.run_keys import differing_keys
from config.schema import compose_config

DATASETS = {"reverse": "alpaca", "si_sft": "si", "si_dpo": "si"}
LAYOUTS = {
    "laptop": ("BasicTrainer", 1),
    "one_gpu": ("BasicTrainer", 1),
    "one_node": ("FSDPTrainer", 1),
    "many_nodes": ("FSDPTrainer", 2),
}
FREE = {
    "model.autocast",
    "model.fsdp_policy_mp",
    "eval_batch_size",
    "n_eval_examples",
}  # dtypes, and how it is measured


@pytest.mark.parametrize("recipe", DATASETS)
def test_a_machine_behind_a_recipe(recipe, tmp_path):
    command = ["model=tiny", f"datasets.{DATASETS[recipe]}.path={tmp_path}"]
    alone = compose_config("config", [f"experiment={recipe}", *command])
    for machine, layout in LAYOUTS.items():
        there = compose_config("config", [f"experiment=[{recipe},{machine}]", *command])
        assert {line.split(":")[0] for line in differing_keys(asdict(alone), asdict(there))} <= FREE
        assert (there.trainer.name, there.trainer.num_replicas) == layout
        assert check_train(there) == []


def test_a_command_chooses_fewer_datasets_than_its_preset(here, tmp_path):
    """What the preset says of those that are left out goes with them; what is typed of them is still told."""
    pair = {"instruction": "Why?", "chosen": "So.", "rejected": "No."}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 2)
    command = ["experiment=safe_sft", "model=tiny", "dry_run=data", "wandb.enabled=false"]
    shrunk = [*command, "datasets=[si]", "datasets.si.path=pairs.jsonl"]
    assert list(compose_config("config", shrunk).datasets) == ["si"]
    assert "si: 2 rows read" in here(*shrunk)  # Hydra composes once more for the run
    kept = compose_config("config", [*command, "datasets=[si,contrast]", "datasets.contrast.path=pairs.jsonl"]).datasets
    assert {name: one.weight for name, one in kept.items()} == {"si": None, "contrast": 0.1}
    assert list(compose_config("config", [*command, "datasets=[alpaca]"]).datasets) == ["alpaca"]
    assert set(compose_config("config", command).datasets) == {"si", "replay", "contrast"}
    with pytest.raises(UserError, match=r"datasets replay is not selected: write datasets=\[...,replay\]"):
        compose_config("config", [*shrunk, "datasets.replay.weight=0.2"])
