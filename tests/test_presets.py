"""`experiment=[RECIPE,MACHINE]`: a machine behind a recipe composes, and changes where and not what is trained."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from config.checks_train import check_train
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
