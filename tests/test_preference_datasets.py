from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, byte_level_tokenizer

import preference_datasets
from config.errors import UserError
from config.settings import DatasetSettings
from preference_datasets import TrainEval, build_stores, describe, load_examples
from safer_instruct.text.examples import held_out
from trainers.data.token_store import TokenStore

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_alpaca.json"
SECRET = "zebra"  # stands for text that must not reach a report, a message or the cache's records
TOKENIZER = byte_level_tokenizer(add_bos=True)


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def published(path: Path) -> Path:
    """A folder as Safer-Instruct publishes it: four files, `rejected` withheld in two of them."""
    for label in ("hate", "illegal", "nsfw", "self-harm"):
        rows = [
            {
                "instruction": f"Question {i} of {label}?",
                "rejected": "" if label in ("illegal", "nsfw") else f" bad {SECRET} {i}",
                "chosen": f"good answer {i}",
                "label": label,
            }
            for i in range(10)
        ]
        write_csv(path / f"{label}.csv", rows)
    return path


def build(
    path: Path | Mapping[str, DatasetSettings], cache: Path, *, loss: Any = "preference", **changes: Any
) -> TrainEval:
    """Stores of one `si` dataset, or of several; keys of DatasetSettings and of build_stores may be mixed."""
    fields = {key: changes.pop(key) for key in list(changes) if key in DatasetSettings.__dataclass_fields__}
    settings = {"schema": "si", "eval_fraction": 0.0, "template": "plain"} | fields
    datasets = path if isinstance(path, Mapping) else {"si": DatasetSettings(path=str(path), **settings)}
    arguments = {"tokenizer": TOKENIZER, "max_length": 512, "max_prompt_length": 256, "cache_dir": cache} | changes
    return build_stores(datasets, loss=loss, **arguments)


def texts(store: TokenStore) -> list[list[str]]:
    return [[TOKENIZER.decode(s, skip_special_tokens=True) for s in store.row(i)] for i in range(len(store))]


def test_published_schema_sft_takes_all_rows_and_dpo_those_with_both(tmp_path: Path) -> None:
    data = published(tmp_path / "data")
    sft = build(data, tmp_path / "cache", loss="likelihood")
    assert len(sft.train) == 40
    assert sft.train.num_segments == 2
    assert texts(sft.train)[0] == ["Question 0 of hate?\n", "good answer 0"]
    dpo = build(data, tmp_path / "cache")
    assert len(dpo.train) == 20
    assert texts(dpo.train)[0] == ["Question 0 of hate?\n", "good answer 0", f"bad {SECRET} 0"]
    counts = dpo.report["datasets"]["si"]
    assert (counts["read"], counts["train"], counts["dropped"]) == (40, 20, {"empty_rejected": 20})
    assert counts["noted"] == {}  # a blank behind a comma is no part of the field
    assert len(counts["ids"]["empty_rejected"]) == 20


def test_reverse_swaps_the_roles(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "Hi"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    stores = build(tmp_path / "a.json", tmp_path / "cache", loss="reverse", schema="alpaca")
    head = (
        "Below is a response to a certain instruction. Write the instruction that the response is trying to complete."
    )
    assert texts(stores.train) == [
        [f"{head}\n\n### response:\n3\n\n### Instruction:", "Add.\n\n1 2"],
        [f"{head}\n\n### response:\nHi\n\n### Instruction:", "Say hi."],
    ]


def test_sft_on_alpaca_uses_the_input_and_ends_in_eos(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    stores = build(tmp_path / "a.jsonl", tmp_path / "c", loss="likelihood", schema="alpaca", template="alpaca")
    prompt, response = stores.train.row(0)
    assert TOKENIZER.decode(prompt).startswith("<s>Below is an instruction that describes a task, paired with an input")
    assert TOKENIZER.decode(prompt).endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert TOKENIZER.decode(response) == f"3{EOS}"


def test_hh_transcripts(tmp_path: Path) -> None:
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    rows = [
        {"chosen": f"{shared} Because.", "rejected": f"{shared} No."},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi there\n\nAssistant: b"},
        {"chosen": "Hi\n\nAssistant: a", "rejected": "Hi\n\nAssistant: b"},
        {"chosen": "\n\nHuman: Hi", "rejected": "\n\nHuman: Hi"},
    ]
    (tmp_path / "hh.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    stores = build(tmp_path / "hh.jsonl", tmp_path / "cache", schema="hh", template="hh")
    assert texts(stores.train) == [[shared, " Because.", " No."]]
    assert stores.report["datasets"]["si"]["dropped"] == {"prompts_differ": 1, "broken_transcript": 2}


def test_a_folder_of_induce_keeps_its_ids(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"row-{i}",
            "instruction": f"Q{i}?",
            "rejected": "b",
            "chosen": "a",
            "label": "x",
            "expert": {"name": "rules"},
        }
        for i in range(3)
    ]
    rows[2]["id"] = "i" * 50
    (tmp_path / "data" / "ledger").mkdir(parents=True)
    (tmp_path / "data" / "si.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "data" / "README.md").write_text("card")
    (tmp_path / "data" / "report.json").write_text("{}")
    (tmp_path / "data" / "ledger" / "induce-0-of-1.jsonl").write_text('{"id": "x"}')
    stores = build(tmp_path / "data", tmp_path / "cache")
    assert [stores.train.ids(i) for i in range(2)] == ["row-0", "row-1"]
    assert len(stores.train.ids(2)) == 16


BAD_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("empty_instruction", {"instruction": " \n", "chosen": "a", "rejected": SECRET}),
    ("empty_chosen", {"instruction": SECRET, "chosen": "", "rejected": "b"}),
    ("empty_chosen", {"instruction": SECRET, "chosen": None, "rejected": "b"}),
    ("empty_rejected", {"instruction": SECRET, "chosen": "a", "rejected": "  "}),
    ("empty_rejected", {"instruction": SECRET, "chosen": "a"}),
    ("chosen_equals_rejected", {"instruction": SECRET, "chosen": "a", "rejected": " a\n"}),
    ("special_token", {"instruction": SECRET, "chosen": "a", "rejected": f"b {EOS} c"}),
    ("special_token", {"instruction": f"{SECRET} <pad>", "chosen": "a", "rejected": "b"}),
    ("not_text", {"instruction": SECRET, "chosen": 3, "rejected": "b"}),
    ("broken_unicode", {"instruction": SECRET, "chosen": "\ud800", "rejected": "b"}),
]
GOOD = {"instruction": "Why?", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS)
def test_bad_rows_are_dropped_and_counted_or_fatal(tmp_path: Path, reason: str, row: dict[str, Any]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n{json.dumps(row)}\n")
    stores = build(file, tmp_path / "cache")
    assert stores.report["datasets"]["si"]["dropped"] == {reason: 1}
    assert texts(stores.train) == [["Why?\n", "good", "bad"]]
    with pytest.raises(UserError, match=rf"a\.jsonl:2: bad row \w+: {reason.replace('_', ' ')}") as caught:
        build(file, tmp_path / "cache", on_bad_row="error")
    messages = [str(caught.value), describe(stores.report), json.dumps(stores.report)]
    messages += [path.read_text() for path in (tmp_path / "cache").rglob("*.json*")]
    assert not any(SECRET in message for message in messages)
    only_bad = tmp_path / "b.jsonl"
    only_bad.write_text(json.dumps({"rejected": "", **row}))
    counts = rf"no usable row to train on(.|\n)*1 rows read(.|\n)*{reason.replace('_', ' ')} 1"
    with pytest.raises(UserError, match=counts):
        build(only_bad, tmp_path / "cache")


def test_long_prompts_and_responses(tmp_path: Path) -> None:
    rows = [
        GOOD,
        {"instruction": "the cat " * 60, "chosen": "sat " * 100, "rejected": "mat"},
        {"instruction": "the mat", "chosen": "a", "rejected": "mat " * 200},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    stores = build(file, tmp_path / "cache", max_length=90, max_prompt_length=70, template="alpaca")
    assert stores.report["datasets"]["si"]["noted"] == {
        "stripped": 2,  # the trailing spaces of the second row's texts, and of the third's
        "prompt_cut": 1,
        "chosen_cut": 1,
        "rejected_cut": 1,
    }
    assert len(stores.report["datasets"]["si"]["ids"]["prompt_cut"]) == 1
    assert stores.train.lengths.sum(1).max() <= 90 + 90
    assert int(stores.train.lengths[:, 0].max()) <= 70
    assert texts(stores.train)[1][0].endswith("\n\n### Response:")
    with pytest.raises(UserError, match=r"prompt too long 3"):
        build(file, tmp_path / "cache", max_length=90, max_prompt_length=20, template="alpaca")


def test_missing_columns_list_the_ones_found(tmp_path: Path) -> None:
    data = published(tmp_path / "data")
    write_csv(data / "nsfw.csv", [{"prompt": "a", "chosen": "b", "label": "c"}])
    found, hint = "prompt, chosen, label", r"in its place, write datasets\.si\.columns\.instruction=prompt$"
    with pytest.raises(UserError, match=rf"nsfw\.csv: missing column instruction, rejected; .*: {found}; .* {hint}"):
        build(data, tmp_path / "cache")
    with pytest.raises(UserError, match="missing column instruction; the columns found are: prompt"):
        build(data, tmp_path / "cache", loss="likelihood")
    with pytest.raises(UserError, match="no rejected responses"):
        build(data, tmp_path / "cache", schema="alpaca")
    with pytest.raises(UserError, match=r"datasets\.si\.schema=sj: the schemas are si, alpaca, hh"):
        build(data, tmp_path / "cache", schema="sj")


def test_labels_and_max_rows(tmp_path: Path) -> None:
    data = published(tmp_path / "data")
    stores = build(data, tmp_path / "cache", labels=["self-harm"])
    assert stores.report["datasets"]["si"]["dropped"] == {"other_label": 30}
    assert all("self-harm" in prompt for prompt, _, _ in texts(stores.train))
    stores = build(data, tmp_path / "cache", max_rows=13)  # usable ones: 10 of hate, 3 of self-harm
    assert [prompt for prompt, _, _ in texts(stores.train)][-1] == "Question 2 of self-harm?\n"
    assert len(stores.train) == 13


@pytest.mark.parametrize("default", [True, False])
def test_the_published_test_prompts_are_not_trained_on(tmp_path: Path, default: bool) -> None:
    data = published(tmp_path / "data")
    test_set = (data if default else tmp_path) / "test_set.csv"
    write_csv(
        test_set, [{"instruction": "  question 3 of HATE?", "label": "si"}, {"instruction": "other", "label": "hh"}]
    )
    stores = build(data, tmp_path / "cache", exclude=None if default else str(test_set))
    assert stores.report["datasets"]["si"]["dropped"]["excluded"] == 1
    assert "instructions of test_set.csv are not trained on" in describe(stores.report)
    assert "Question 3 of hate?\n" not in [prompt for prompt, *_ in texts(stores.train)]
    assert len(stores.train) == 19
    assert len(build(data, tmp_path / "cache", exclude="").train) == 20
    assert len(build(data, tmp_path / "cache", on_bad_row="error", exclude=str(test_set), labels=["hate"]).train) == 9


def test_rows_with_one_instruction_never_straddle_the_split(tmp_path: Path) -> None:
    rows = [{"instruction": f"Q{i % 100}", "chosen": f"a{i}", "rejected": "b"} for i in range(300)]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    stores = build(file, tmp_path / "cache", eval_fraction=0.3)
    train, held = ({prompt for prompt, *_ in texts(store)} for store in (stores.train, stores.eval))
    assert not train & held
    assert held == {f"Q{i}\n" for i in range(100) if held_out(f"Q{i}", 0.3)}
    assert (len(stores.train), len(stores.eval)) == (3 * len(train), 3 * len(held))
    some = build(file, tmp_path / "cache", eval_fraction=0.3, n_eval_examples=7)
    assert len(some.eval) == 7
    ids = [some.eval.ids(i) for i in range(7)]
    again = build(file, tmp_path / "cache", eval_fraction=0.3, n_eval_examples=7)
    assert ids == [again.eval.ids(i) for i in range(7)]
    assert ids != [stores.eval.ids(i) for i in range(7)]  # a random subset, not the head of a file sorted by label
    with pytest.raises(UserError, match="all 300 usable rows are held out"):
        build(file, tmp_path / "cache", eval_fraction=1.0)


def test_an_evaluation_file_is_kept_out_of_training(tmp_path: Path) -> None:
    data = published(tmp_path / "data")
    rows = [{"instruction": "Question 1 of hate? ", "chosen": "a", "rejected": "b", "label": "hate"}]
    held = write_csv(tmp_path / "held.csv", rows)
    stores = build(data, tmp_path / "cache", eval_path=str(held), eval_fraction=0.5, max_rows=15)
    assert texts(stores.eval) == [["Question 1 of hate?\n", "a", "b"]]
    assert len(stores.train) == 15
    assert stores.report["datasets"]["si"]["dropped"]["in_eval_file"] == 1
    assert "Question 1 of hate?\n" not in [prompt for prompt, *_ in texts(stores.train)]


def test_an_evaluation_file_is_kept_out_of_every_dataset(tmp_path: Path) -> None:
    rows = [{"instruction": "Question 1 of hate?", "chosen": "a", "rejected": "b", "label": "hate"}]
    held = write_csv(tmp_path / "held.csv", rows)
    path = str(published(tmp_path / "data"))
    first = DatasetSettings(path=path, schema="si", eval_fraction=0.0)  # read before the one with the file
    second = DatasetSettings(path=path, schema="si", eval_path=str(held))
    stores = build({"first": first, "second": second}, tmp_path / "cache")
    assert [stores.report["datasets"][name]["dropped"]["in_eval_file"] for name in ("first", "second")] == [1, 1]
    assert not any("Question 1 of hate?" in prompt for prompt, *_ in texts(stores.train))


def test_several_datasets_follow_each_other(tmp_path: Path) -> None:
    si = DatasetSettings(path=str(published(tmp_path / "si")), schema="si", eval_fraction=0.0)
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "Add.", "input": "", "output": "3"}))
    alpaca = DatasetSettings(path=str(tmp_path / "a.jsonl"), schema="alpaca", eval_fraction=0.0)
    stores = build({"si": si, "alpaca": alpaca}, tmp_path / "cache", loss="likelihood")
    assert len(stores.train) == 41
    assert texts(stores.train)[40][1] == "3"
    assert list(stores.report["datasets"]) == ["si", "alpaca"]
    other = build({"alpaca": alpaca, "si": si}, tmp_path / "cache", loss="likelihood")
    assert other.train.key != stores.train.key


def test_a_second_start_tokenises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = published(tmp_path / "data")
    first = build(data, tmp_path / "cache", eval_fraction=0.2)
    moved = data.rename(tmp_path / "elsewhere")

    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("tokenised twice")

    monkeypatch.setattr(preference_datasets, "_write_stores", never)
    second = build(moved, tmp_path / "cache", eval_fraction=0.2)
    assert (second.train.key, second.report) == (first.train.key, first.report)
    for i in range(len(first.train)):
        assert all(torch.equal(a, b) for a, b in zip(first.train.row(i), second.train.row(i), strict=True))
    for changes in (
        {"max_length": 300},
        {"max_prompt_length": 100},
        {"loss": "likelihood"},
        {"loss": "likelihood", "all_answers": True},
        {"system": "Be kind.", "template": "vicuna"},
        {"template": "alpaca"},
        {"eval_fraction": 0.3},
        {"max_rows": 5},
        {"labels": ["hate"]},
        {"on_bad_row": "error"},
        {"tokenizer": byte_level_tokenizer(add_bos=False)},
        {"eval_path": str(moved / "hate.csv")},
        {"exclude": str(moved / "nsfw.csv")},
    ):
        with pytest.raises(AssertionError, match="tokenised twice"):
            build(moved, tmp_path / "cache", **({"eval_fraction": 0.2} | changes))
    with (moved / "hate.csv").open("a") as file:
        file.write("a,b,c,hate\n")
    with pytest.raises(AssertionError, match="tokenised twice"):
        build(moved, tmp_path / "cache", eval_fraction=0.2)


def test_small_splits_are_fine_and_said(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(GOOD))
    stores = build(file, tmp_path / "cache", batch_size=8)
    assert (len(stores.train), len(stores.eval)) == (1, 0)
    text = describe(stores.report)
    assert "the training split has 1 rows, fewer than batch_size=8" in text
    assert "nothing to evaluate on" in text


def test_the_report_tells_when_answers_are_one_and_the_same(tmp_path: Path) -> None:
    rows = [{"instruction": f"Q{i}", "chosen": "No." if i < 4 else f"a{i}", "rejected": "b"} for i in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert "40.0% of the rows used have the same target text" in describe(
        build(tmp_path / "a.jsonl", tmp_path / "cache").report
    )


def test_rows_jsonl_names_every_row_that_was_dropped_or_cut(tmp_path: Path) -> None:
    data = published(tmp_path / "data")
    build(data, tmp_path / "cache")
    (events,) = (tmp_path / "cache").rglob("rows.jsonl")
    records = [json.loads(line) for line in events.read_text().splitlines()]
    dropped = [record for record in records if record["what"] == "empty_rejected"]
    assert len(dropped) == 20
    assert dropped[0]["where"] == f"{data / 'illegal.csv'}:2"


def test_load_examples_streams_and_counts(tmp_path: Path) -> None:
    settings = DatasetSettings(path=str(published(tmp_path / "data")), schema="si")
    loaded = load_examples(settings, "si", pairs=True)
    examples = list(loaded)
    assert (len(examples), loaded.log.read, loaded.log.dropped) == (20, 40, {"empty_rejected": 20})
    assert (examples[0].chosen, examples[0].label) == ("good answer 0", "hate")
    assert len(list(load_examples(settings, "si"))) == 40


@pytest.mark.skipif(not GSM8K.is_file(), reason="../shared/data/gsm8k_alpaca.json is not here")
def test_gsm8k(tmp_path: Path) -> None:
    settings = DatasetSettings(path=str(GSM8K), schema="alpaca", max_rows=500)
    stores = build({"alpaca": settings}, tmp_path / "cache", loss="reverse", max_length=1024, max_prompt_length=512)
    rows = json.loads(GSM8K.read_text())[:500]
    assert len(stores.train) + len(stores.eval) == 500
    assert {response for _, response in texts(stores.eval)} == {
        row["instruction"].strip() for row in rows if held_out(row["instruction"], 0.05)
    }


def test_the_identity_of_the_data_is_its_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment in the code makes another cache entry, and must not strand a run that has been stopped."""
    data = published(tmp_path / "data")
    first = build(data, tmp_path / "cache").train
    changed = tmp_path / "encoding.py"
    changed.write_text("# a comment\n")
    hashed = preference_datasets.hash_files
    code = Path(preference_datasets.__file__)
    monkeypatch.setattr(
        preference_datasets, "hash_files", lambda files: hashed([*files, changed] if code in files else files)
    )
    second = build(data, tmp_path / "cache").train
    assert second.key != first.key
    assert second.content == first.content
    some = torch.arange(3)
    assert second.select(some).content == first.select(some).content != first.content
    rows = (data / "hate.csv").read_text().replace("good answer 7", "good answer 8")
    (data / "hate.csv").write_text(rows)
    assert build(data, tmp_path / "cache").train.content != first.content


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {"instruction": "Why?", "system": "You are kind.", "turns": [["a", "b"]] if i else [], "chosen": f"Why? {i}",
         "rejected": "no", "label": label, "id": 7}
        for i, label in enumerate((1, True, None, "x"))
    ]  # fmt: skip
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_text("\n".join(json.dumps(row) for row in rows))
    stores = build(folder, tmp_path / "cache")
    text = describe(stores.report)
    assert len(stores.train) == 4
    assert "columns that the schema does not read: system (4 rows), turns (3 rows)" in text
    assert "files: train.jsonl\n  not read because of their names: test.jsonl; datasets.si.eval_path=FILE" in text
    assert "chosen begins with its instruction 4" in text
    assert len(build(folder, tmp_path / "cache", labels=["1", "True"]).train) == 2


def test_a_column_is_renamed_by_a_setting(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"prompt": "Ask", "chosen": "a", "rejected": "b"}])
    stores = build(tmp_path / "a.csv", tmp_path / "cache", columns={"instruction": "prompt"})
    assert texts(stores.train) == [["Ask\n", "a", "b"]]


def test_a_chat_ends_its_turn(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(add_bos=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    stores = build(tmp_path / "a.jsonl", tmp_path / "cache", template="chat", tokenizer=tokenizer)
    assert [tokenizer.decode(part) for part in stores.train.row(0)] == [
        "<s><user>Why?<|end|><assistant>", "good<|end|>", "bad<|end|>",
    ]  # fmt: skip
