"""datasets.NAME.weight: the shares of the training rows, and what is said where nearly every prompt is declined."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import byte_level_tokenizer

from config.errors import UserError
from config.schema import compose_config
from config.settings import DatasetSettings
from preference_datasets import build_stores, describe
from tests.commands import errors_of
from trainers.data.mixture import mixture

TOKENIZER = byte_level_tokenizer(add_bos=True)


@pytest.mark.parametrize(
    ("num_rows", "weights", "expected"),
    [
        ({"a": 10, "b": 4}, {"a": None, "b": None}, {"a": 10, "b": 4}),
        ({"a": 0}, {"a": None}, {"a": 0}),
        ({"a": 100, "b": 40}, {"a": 0.5, "b": 0.5}, {"a": 40, "b": 40}),
        ({"a": 100, "b": 40}, {"a": None, "b": 0.2}, {"a": 100, "b": 25}),
        ({"a": 100, "b": 300, "c": 90}, {"a": None, "b": None, "c": 0.5}, {"a": 22, "b": 68, "c": 90}),
    ],
)
def test_rows_have_their_shares_and_none_is_repeated(num_rows, weights, expected) -> None:
    chosen = mixture(num_rows, weights)
    assert {name: len(rows) for name, rows in chosen.items()} == expected
    for name, rows in chosen.items():
        assert rows.unique().tolist() == rows.tolist()
        assert not len(rows) or 0 <= int(rows.min()) <= int(rows.max()) < num_rows[name]


def test_a_larger_share_holds_the_smaller() -> None:
    few = mixture({"a": 1000, "b": 200}, {"a": None, "b": 0.1})["b"]
    many = mixture({"a": 1000, "b": 200}, {"a": None, "b": 0.15})["b"]
    assert len(few) < len(many)
    assert set(few.tolist()) < set(many.tolist())


def write(path: Path, num_rows: int, chosen: str) -> DatasetSettings:
    rows = [{"id": f"{path.stem}{i}", "instruction": f"{path.stem} {i}", "chosen": chosen} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetSettings(path=str(path), schema="si", template="plain", eval_fraction=0.0)


def build(datasets: dict[str, DatasetSettings], cache: Path, loss: str = "likelihood"):
    return build_stores(
        datasets, loss=loss, tokenizer=TOKENIZER, max_length=256, max_prompt_length=128, cache_dir=cache
    )  # fmt: skip


def test_the_store_holds_the_mixture_and_the_cache_is_shared(tmp_path, monkeypatch) -> None:
    datasets = {"si": write(tmp_path / "si.jsonl", 60, "I cannot help with that."), "replay": None}
    datasets["replay"] = write(tmp_path / "replay.jsonl", 30, "Here you are.")
    whole = build(datasets, tmp_path / "cache")
    assert len(whole.train) == 90
    datasets["replay"].weight = 0.25
    mixed = build(datasets, tmp_path / "cache")
    names = [mixed.train.ids(row) for row in range(len(mixed.train))]
    assert [sum(name.startswith(kind) for name in names) for kind in ("si", "replay")] == [60, 20]
    assert mixed.train.content != whole.train.content
    assert len(list((tmp_path / "cache" / "tokens").glob("*.lock"))) == 1, "the tokens are encoded once"
    assert "trained on, by the weights of the datasets: 20 rows" in describe(mixed.report)
    row = names.index("replay3") if "replay3" in names else 60
    text = TOKENIZER.decode(torch.cat(mixed.train.row(row)).tolist(), skip_special_tokens=True)
    assert names[row].replace("replay", "replay ") in text


def test_a_share_of_no_rows_is_refused(tmp_path) -> None:
    datasets = {"si": write(tmp_path / "si.jsonl", 5, "No."), "replay": write(tmp_path / "replay.jsonl", 5, "")}
    datasets["replay"].weight = 0.5
    with pytest.raises(UserError, match=r"(?s)datasets.replay.weight=0.5: it has no usable row.*empty chosen 5"):
        build(datasets, tmp_path / "cache")


def test_data_that_declines_everything_is_said_loudly(tmp_path) -> None:
    si = write(tmp_path / "si.jsonl", 40, "I'm sorry, but I can't help with that.")
    replay = write(tmp_path / "replay.jsonl", 10, "Here you are.")
    alone = build({"si": si}, tmp_path / "cache")
    assert "WARNING: 0 of 40 prompts (0.0%) are to be answered" in describe(alone.report)
    assert alone.report["datasets"]["si"]["answered"] == 0
    both = build({"si": si, "replay": replay}, tmp_path / "cache")
    assert "WARNING" not in describe(both.report)
    assert both.report["datasets"]["replay"]["answered"] == 10
    assert "WARNING" not in describe(build({"si": si}, tmp_path / "cache", "reverse").report)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"si": 0.5, "replay": 0.4, "contrast": 0.3}, "shares of all datasets must sum to 1, and these sum to 1.2"),
        ({"replay": 0.6, "contrast": 0.4}, "these shares sum to 1, which leaves nothing for si"),
        ({"replay": 0.0}, r"datasets.replay.weight=0.0: must lie in (0, 1]; leave the dataset out"),
    ],
)
def test_weights_that_do_not_sum_are_refused(weights, message, monkeypatch, capsys, tmp_path) -> None:
    path = write(tmp_path / "x.jsonl", 1, "x").path
    words = ["loss=sft", "model=tiny", "exp_name=x", "datasets=[si,replay,contrast]"]
    words += [f"datasets.{name}.path={path}" for name in ("si", "replay", "contrast")]
    words += [f"datasets.{name}.weight={weight}" for name, weight in weights.items()]
    assert any(message in line for line in errors_of(words, monkeypatch, capsys))


@pytest.mark.parametrize("name", ["safe_sft", "safe_dpo"])
def test_the_presets_answer_as_many_prompts_as_they_decline(name) -> None:
    config = compose_config("config", [f"experiment={name}", "model=tiny"])
    assert list(config.datasets) == ["si", "replay", "contrast"]
    assert [dataset.weight for dataset in config.datasets.values()] == [None, 0.4, 0.1]
    assert config.sample_during_eval
