"""The recipe of docs/losses.md for a new loss, done literally: its code blocks, and a line in each of two tables."""

import json
import re
from pathlib import Path

from config import pair_losses
from config.settings import LOSSES
from tests.commands import write_pairs
from trainers.losses import PAIR_LOSSES, ratios

RECIPE = (Path(__file__).parent.parent / "docs" / "losses.md").read_text().split("## Adding a loss")[1]


def test_a_loss_by_the_recipe_trains(here, tmp_path, monkeypatch, tiny_model_folder):
    blocks = re.findall(r"^   ```\w+\n(.*?)^   ```", RECIPE, re.DOTALL | re.MULTILINE)
    function, dataclass_, yaml_ = ("\n".join(line[3:] for line in block.splitlines()) for block in blocks)
    lines = [line for block in (function, dataclass_, yaml_) for line in block.splitlines() if line.strip()]
    assert len(lines) + 2 <= 30  # and the two lines of the tables

    added: dict = {}
    exec(dataclass_, vars(pair_losses), added)
    monkeypatch.setitem(LOSSES, "squared_hinge", added["SquaredHingeSettings"])
    exec(function, {**vars(ratios), **added}, added)
    monkeypatch.setitem(PAIR_LOSSES, "squared_hinge", added["squared_hinge_loss"])
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "squared_hinge.yaml").write_text(yaml_)

    here(
        "--config-dir", str(tmp_path / "mine"), "loss=squared_hinge", "loss.beta=0.5", "model=blank_model",
        f"model.name_or_path={tiny_model_folder}", f"datasets.si.path={write_pairs(tmp_path / 'pairs.jsonl', 12)}",
        "exp_name=new", "max_length=128", "max_prompt_length=100", "wandb.enabled=false", "minimum_log_interval_secs=0",
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "runs" / "new" / "metrics.jsonl").read_text().splitlines()]
    (first, *_) = [row["loss/train"] for row in rows if "loss/train" in row]
    assert abs(first - 1.0) < 1e-6  # max(0, 1 - 0)^2, before the first step


def test_kto_from_the_command_line(here, tmp_path, tiny_model_folder):
    """Pairs taken apart: loss and rewards of the first batch are known, and the run goes to its end."""
    here(
        "loss=kto", "loss.good_weight=1.5", "model=blank_model", f"model.name_or_path={tiny_model_folder}",
        f"datasets.si.path={write_pairs(tmp_path / 'pairs.jsonl', 24)}", "datasets.si.split_pairs=true", "lr=1e-3",
        "exp_name=kto", "max_length=128", "max_prompt_length=100", "wandb.enabled=false", "minimum_log_interval_secs=0",
        "gradient_accumulation_steps=2", "datasets.si.eval_fraction=0.3",
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "runs" / "kto" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "loss/train" in row)
    assert 0.5 <= first["loss/train"] <= 0.75  # halves of the weights, 1 and 1.5
    assert abs(first["kl_train"]) < 1e-4
    assert {"rewards_train/chosen", "rewards_train/rejected", "rewards_train/signed"} <= set().union(*rows)
    assert sorted((tmp_path / "runs" / "kto" / "checkpoints").iterdir())
