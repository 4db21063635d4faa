"""What training leaves out and what evaluation reports as trained on: one rule, whatever the file is called."""

import json
from dataclasses import replace

import pytest
import yaml

from config.settings import DatasetSettings
from preference_datasets import build_stores
from safer_instruct.report.training_runs import find_training_overlap
from safer_instruct.text.exclusion import instruction_key, turn_keys
from safer_instruct.text.loading import load_examples

ROWS = [("seen  One", ""), ("Left out", ""), ("translate", "a sentence")]


def write(file, rows):
    lines = [
        {"instruction": instruction, "input": material, "chosen": f"no {i}", "rejected": f"yes {i}"}
        for i, (instruction, material) in enumerate(rows)
    ]
    file.write_text(json.dumps(lines))


def trained_and_reported(folder, tokenizer, settings):
    """How many rows a run with these settings trains on, and which of `ROWS` an evaluation says it was trained on."""
    stores = build_stores(
        {"si": settings}, loss="preference", tokenizer=tokenizer, max_length=512, max_prompt_length=400,
        cache_dir=folder / "cache",
    )  # fmt: skip
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"datasets": {"si": vars(settings)}}))
    asked = {instruction_key(*row): [row[0]] for row in ROWS}
    (overlap,) = find_training_overlap(str(run), asked)
    return stores.report["num_train"], set(overlap.prompt_ids)


@pytest.mark.parametrize("name", ["pairs.json", "test_set.json", "test_set.csv"])
def test_data_of_any_name_is_trained_on_and_reported(name, tmp_path, tokenizer):
    file = tmp_path / name
    write(file, ROWS)
    if name.endswith(".csv"):
        rows = json.loads(file.read_text())
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n")
    settings = DatasetSettings(str(file), "si", eval_fraction=0.0)
    assert trained_and_reported(tmp_path, tokenizer, settings) == (3, {row[0] for row in ROWS})


def test_the_test_set_beside_the_data_is_left_out_by_both(tmp_path, tokenizer):
    write(tmp_path / "si.json", ROWS)
    (tmp_path / "test_set.csv").write_text("instruction\nleft  OUT\n")
    settings = DatasetSettings(str(tmp_path / "si.json"), "si", eval_fraction=0.0)
    assert trained_and_reported(tmp_path, tokenizer, settings) == (2, {"seen  One", "translate"})


def test_rows_of_the_evaluation_file_are_left_out_by_both(tmp_path, tokenizer):
    write(tmp_path / "si.json", ROWS)
    write(tmp_path / "held.json", ROWS[2:])
    settings = DatasetSettings(str(tmp_path / "si.json"), "si", eval_path=str(tmp_path / "held.json"))
    assert trained_and_reported(tmp_path, tokenizer, settings) == (2, {"seen  One", "Left out"})


def test_a_later_turn_is_what_it_was_behind(tmp_path, tokenizer):
    """The same short question behind another conversation is neither left out nor reported."""
    said = [[["Rain?", "Yes."]], [["Coins?", "No."]], []]
    rows = [
        {"instruction": "Why?", "chosen": f"no {i}", "rejected": "yes", "history": one} for i, one in enumerate(said)
    ]
    (tmp_path / "si.json").write_text(json.dumps(rows))
    (tmp_path / "out.json").write_text(json.dumps(rows[:1]))
    settings = DatasetSettings(str(tmp_path / "si.json"), "si", template="hh", eval_fraction=0.0)
    whole = build_stores(
        {"si": replace(settings, exclude=str(tmp_path / "out.json"))}, loss="preference", tokenizer=tokenizer,
        max_length=512, max_prompt_length=400, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert (whole.report["num_train"], whole.report["datasets"]["si"]["dropped"]) == (2, {"excluded": 1})
    keys = {turn_keys(example)[-1]: [example.chosen] for example in load_examples(settings, "si")}
    assert len(keys) == 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"datasets": {"si": vars(settings)}}))
    (tmp_path / "si.json").write_text(json.dumps(rows[1:2]))
    (overlap,) = find_training_overlap(str(tmp_path), keys)
    assert overlap.prompt_ids == ("no 1", "no 2")  # what had nothing before it is looked for in every turn
    held = replace(settings, eval_path=str(tmp_path / "si.json"))  # train.py leaves out what begins as one of its rows
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"datasets": {"si": vars(held)}}))
    (overlap,) = find_training_overlap(str(tmp_path), keys)
    assert overlap.prompt_ids == ()


def test_an_exclude_file_that_is_gone_hides_no_overlap(tmp_path):
    write(tmp_path / "si.json", ROWS)
    settings = DatasetSettings(str(tmp_path / "si.json"), "si", eval_fraction=0.0, exclude=str(tmp_path / "gone.csv"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"datasets": {"si": vars(settings)}}))
    (overlap,) = find_training_overlap(str(tmp_path), {instruction_key("left out"): ["x"]})
    assert overlap.prompt_ids == ("x",)
