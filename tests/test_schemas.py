"""Each dataset in the form that it is published in, small, with broken rows: what is read, and what is counted."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import byte_level_tokenizer

from config import names
from config.errors import UserError
from config.schema import compose_config
from config.settings import DatasetSettings
from preference_datasets import build_stores, load_examples
from safer_instruct.text.html_text import html_text
from safer_instruct.text.pairs import Answer, make_pairs
from safer_instruct.text.schemas import SCHEMAS

U, A, S = "user", "assistant", "system"


def said(*turns: tuple[str, str], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, str]]:
    return [dict(zip(keys, turn, strict=True)) for turn in turns]


def shared_gpt(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return said(*turns, keys=("from", "value"))


PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
TALK = said((U, "Hi"), (A, "Hello"), (U, "Why?"))
SO, NO = said((A, "So.")), said((A, "No."))
TALKED = ("Why?", "So.", "No.", ("Hi", "Hello"), "")
WHY = ("Why?", "So.", "No.", (), "")
SHP = {
    "post_id": "x", "domain": "askbaking", "history": "Why?", "human_ref_A": "No.", "human_ref_B": "So.", "labels": 0,
    "score_A": 5, "score_B": 15, "score_ratio": 3.0,
}  # fmt: skip
SE = {
    "qid": 1, "question": "<p>Why?</p>",
    "answers": [{"text": "<p>No.</p>", "pm_score": 0}, {"text": "<p>So.</p>", "pm_score": 4}],
}  # fmt: skip
COMPLETIONS = [
    {"model": m, "response": r, "overall_score": o, "fine-grained_score": f}
    for m, r, o, f in (("a", "Maybe.", 10, 3.0), ("b", "So.", 8, 4.5), ("c", "No.", 8, 1.25))
]
SAFE = {
    "prompt": "Why?", "response_0": "No.", "response_1": "So.", "is_response_0_safe": False, "is_response_1_safe": True,
    "better_response_id": 0, "safer_response_id": 1,
}  # fmt: skip
STEER3 = {"domain": "general", "context": TALK, "response1": "So.", "response2": "No.", "overall_preference": -2}

# schema, good rows, (instruction, chosen, rejected, contents of the history, system) of each pair
PAIRS: list[tuple[str, list[dict[str, Any]], list[tuple[Any, ...]]]] = [
    ("si", [{"instruction": "Why?", "chosen": "So.", "rejected": "No."}], [WHY]),
    (
        "hh",
        [{c: f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: {t}" for c, t in
          (("chosen", "So."), ("rejected", "No."))}],
        [TALKED],
    ),
    ("shp", [SHP], [WHY]),
    ("se", [SE], [WHY]),
    ("se", [{"question": "Why?", "response_j": "So.", "response_k": "No."}], [WHY]),
    ("ultrafeedback", [{"source": "x", "instruction": "Why?", "completions": COMPLETIONS}], [WHY]),
    (
        "ultrafeedback",
        [{"prompt": "Why?", "chosen": said((U, "Why?"), (A, "So.")), "rejected": said((U, "Why?"), (A, "No.")),
          "messages": said((U, "Why?"), (A, "So.")), "score_chosen": 8.5, "score_rejected": 3.0}],
        [WHY],
    ),
    ("beavertails", [SAFE], [WHY]),
    (
        "helpsteer",
        [{"prompt": "Why?", "response": t, "helpfulness": s} for t, s in (("No.", 1), ("So.", 4), ("Maybe.", 2))],
        [WHY],
    ),
    (
        "helpsteer",
        [{"prompt": "Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nWhy?", "response": t, "helpfulness": s}
         for t, s in (("So.", 4), ("No.", 1))],
        [TALKED],
    ),
    ("helpsteer", [STEER3], [TALKED]),
    ("custom", [PAIR], [WHY]),
    ("custom", [{"prompt": "Why? ", "chosen": "Why? So.", "rejected": "Why? No."}], [WHY]),
    ("custom", [{"chosen": "Why? So.", "rejected": "Why? No."}], [WHY]),
    (
        "custom",
        [{c: f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: {t}" for c, t in
          (("chosen", "So."), ("rejected", "No."))}],
        [TALKED],
    ),
    ("custom", [{"prompt": TALK, "chosen": SO, "rejected": NO}], [TALKED]),
    ("custom", [{"prompt": TALK, "chosen": TALK + SO, "rejected": TALK + NO}], [TALKED]),
    ("custom", [{"chosen": TALK + SO, "rejected": TALK + NO}], [TALKED]),
    (
        "custom",
        [{"chosen": said((S, "Be brief."), *[tuple(t.values()) for t in TALK + SO]),
          "rejected": said((S, "Be brief."), *[tuple(t.values()) for t in TALK + NO])}],
        [("Why?", "So.", "No.", ("Hi", "Hello"), "Be brief.")],
    ),
    ("custom", [{"system": "Be brief.", "prompt": TALK, "chosen": SO, "rejected": NO}], [(*TALKED[:4], "Be brief.")]),
    ("custom", [{"prompt": "Why?", "responses": ["No.", "So.", "Maybe."], "scores": [1, 3, 2]}], [WHY]),
]  # fmt: skip

ONE = ("Why?", "So.", (), "")
SINGLE: list[tuple[str, list[dict[str, Any]], list[tuple[Any, ...]]]] = [
    ("alpaca", [{"instruction": "Why?", "input": "x", "output": "So."}], [ONE]),
    ("dolly", [{"instruction": "Why?", "context": "x", "response": "So.", "category": "qa"}], [ONE]),
    (
        "sharegpt",
        [{"id": "a", "conversations": shared_gpt(("human", "Hi"), ("gpt", "Hello"), ("human", "Why?"), ("gpt", "So."),
                                                 ("human", "Thanks"))}],
        [("Why?", "So.", ("Hi", "Hello"), "")],
    ),
    (
        "sharegpt",
        [{"messages": said((S, "Be brief."), (U, "Why?"), (A, "So."))}],
        [("Why?", "So.", (), "Be brief.")],
    ),
    ("beavertails", [{"prompt": "Why?", "response": "So.", "category": {}, "is_safe": True}], [ONE]),
    ("helpsteer", [{"prompt": "Why?", "response": t, "helpfulness": s} for t, s in (("No.", 1), ("So.", 4))],
     [("Why?", "So.", (), "")]),
    ("unpaired", [{"instruction": "Why?", "response": "So.", "good": True}], [ONE]),
    ("custom", [{"prompt": "Why?", "completion": "So."}], [ONE]),
    ("custom", [{"prompt": "Why?", "completion": "So.", "label": "true"}], [ONE]),
    ("custom", [{"prompt": TALK, "completion": SO}], [("Why?", "So.", ("Hi", "Hello"), "")]),
    ("custom", [{"messages": TALK + SO}], [("Why?", "So.", ("Hi", "Hello"), "")]),
]  # fmt: skip


def settings_of(schema: str, path: Path, **changes: Any) -> DatasetSettings:
    columns = {"score": "helpfulness"} if schema == "helpsteer" else {}
    return DatasetSettings(path=str(path), schema=schema, **{"columns": columns, **changes})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def found(examples: Any, *, pairs: bool) -> list[tuple[Any, ...]]:
    return [
        (
            one.instruction, one.chosen, *([one.rejected] if pairs else []), tuple(t.content for t in one.history),
            one.system,
        )
        for one in examples
    ]  # fmt: skip


@pytest.mark.parametrize(("schema", "rows", "expected"), PAIRS, ids=[f"{i}-{s}" for i, (s, *_) in enumerate(PAIRS)])
def test_pairs_as_they_are_published(schema: str, rows: list[dict[str, Any]], expected: Any, tmp_path: Path) -> None:
    examples = load_examples(settings_of(schema, write(tmp_path / "a.jsonl", rows)), schema, pairs=True)
    assert found(examples, pairs=True) == expected
    assert (examples.log.read, sum(examples.log.dropped.values())) == (len(rows), 0)


@pytest.mark.parametrize(("schema", "rows", "expected"), SINGLE, ids=[f"{i}-{s}" for i, (s, *_) in enumerate(SINGLE)])
def test_answers_as_they_are_published(schema: str, rows: list[dict[str, Any]], expected: Any, tmp_path: Path) -> None:
    examples = load_examples(settings_of(schema, write(tmp_path / "a.jsonl", rows)), schema)
    assert found(examples, pairs=False) == expected


FORMS = [(*form, True) for form in PAIRS] + [(*form, False) for form in SINGLE]


@pytest.mark.parametrize(
    ("schema", "rows", "expected", "pairs"), FORMS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FORMS)]
)
def test_one_broken_row_in_twenty_is_counted_and_the_others_are_read(
    schema: str, rows: list[dict[str, Any]], expected: list[tuple[Any, ...]], pairs: bool, tmp_path: Path
) -> None:
    """Behind every 19 rows one that is broken: a line that is no JSON, and one whose columns are numbers, by turns."""
    text = json.dumps(rows)
    good = [json.loads(text.replace("Why?", f"Why {i}?")) for i in range(38)]  # answers to one prompt stay together
    lines: list[str] = []
    for i, unit in enumerate(good, start=1):
        lines += [json.dumps(row) for row in unit]
        if i % 19 == 0:
            lines += ['{"prompt": "zebra', json.dumps(dict.fromkeys(rows[0], 5))] * len(rows)
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    examples = load_examples(settings_of(schema, tmp_path / "a.jsonl"), schema, pairs=pairs)
    read = found(examples, pairs=pairs)
    assert [
        json.loads(json.dumps(one).replace(f"Why {i // len(expected)}?", "Why?")) for i, one in enumerate(read)
    ] == (json.loads(json.dumps(expected)) * 38)
    broken = len(lines) - 38 * len(rows)
    assert broken >= 0.05 * len(lines)
    assert (examples.log.read, sum(examples.log.dropped.values())) == (len(lines), broken)
    assert examples.log.dropped["broken_json"] == broken // 2


# schema, row -> the reason that is counted, and the column that a message names
BROKEN: list[tuple[str, dict[str, Any], str, str]] = [
    ("hh", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "prompts differ",
     "rejected"),
    ("shp", {**SHP, "labels": 2}, "no preference", "labels"),
    ("shp", {**SHP, "score_ratio": 1.5}, "small margin", ""),
    ("se", {"question": "a", "answers": [{"text": "a"}]}, "no score", r"answers\[0\]"),
    ("se", {"question": "a", "answers": [{"text": "a", "pm_score": 1}]}, "one answer", ""),
    ("se", {"question": "a", "answers": [{"text": t, "pm_score": 1} for t in "ab"]}, "equal scores", ""),
    ("ultrafeedback", {"instruction": "a", "completions": [{"fine-grained_score": 1}]}, "missing field",
     r"completions\[0\]"),
    ("beavertails", {**SAFE, "safer_response_id": None}, "no preference", "safer_response_id"),
    ("helpsteer", {**STEER3, "overall_preference": 0}, "equal scores", "overall_preference"),
    ("custom", {"prompt": "a", "chosen": TALK + SO, "rejected": said((U, "Hm?"), (A, "No."))}, "prompts differ",
     "rejected"),
    ("custom", {"prompt": "Hm?", "chosen": TALK + SO, "rejected": TALK + NO}, "prompts differ", "prompt"),
    ("custom", {"chosen": TALK, "rejected": TALK}, "no answer", "chosen"),
    ("custom", {"chosen": "So.", "rejected": "No."}, "no prompt", "prompt"),
    ("custom", {"chosen": [{"role": "wizard", "content": "x"}], "rejected": NO}, "unknown role", r"chosen\[0\]"),
    ("custom", {"chosen": [{"role": U, "content": 5}, *SO], "rejected": NO}, "not text", r"chosen\[0\]"),
    ("custom", {"prompt": "a", "responses": ["b", "c"], "scores": [1]}, "no score", "scores"),
    ("custom", {"prompt": "a", "chosen": 5, "rejected": "b"}, "not text", "chosen"),
    ("custom", {"prompt": said((U, "a"), (S, "b"), (U, "c")), "chosen": SO, "rejected": NO}, "late system", "prompt"),
]  # fmt: skip


def in_parts(talk: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{"role": one["role"], "content": [{"type": "text", "text": one["content"]}]} for one in talk]


@pytest.mark.parametrize("write_as", [json.dumps, repr, in_parts])
def test_messages_as_texts_and_in_parts_are_messages(write_as: Any, tmp_path: Path) -> None:
    row = {"chosen": write_as(TALK + SO), "rejected": write_as(TALK + NO)}
    examples = load_examples(settings_of("custom", write(tmp_path / "a.jsonl", [row])), "c", pairs=True)
    assert found(examples, pairs=True) == [TALKED]


def test_messages_are_no_text(tmp_path: Path) -> None:
    """A schema of plain texts would train on the list itself: such rows are dropped, and the message says why."""
    rows = [{"instruction": "Why?", "chosen": json.dumps(SO), "rejected": json.dumps(NO)}]
    examples = load_examples(settings_of("si", write(tmp_path / "a.jsonl", rows)), "si", pairs=True)
    assert found(examples, pairs=True) == []
    assert examples.log.dropped == {"not_text": 1}
    with pytest.raises(UserError, match=r"(?s)not text 1.*first: .*a.jsonl:1: not text in column chosen .*=\[custom\]"):
        build_stores(
            {"si": settings_of("si", tmp_path / "a.jsonl")}, loss="preference", max_length=99, max_prompt_length=66,
            tokenizer=byte_level_tokenizer(add_bos=False), cache_dir=tmp_path / "cache",
        )  # fmt: skip


@pytest.mark.parametrize(("schema", "row", "reason", "column"), BROKEN)
def test_a_broken_row_says_file_line_column_and_what_was_expected(
    schema: str, row: dict[str, Any], reason: str, column: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", [row])
    limits = {"min_margin": 2.0} if schema == "shp" else {}
    examples = load_examples(settings_of(schema, file, **limits), schema, pairs=True)
    assert not list(examples)
    assert dict(examples.log.dropped) == {reason.replace(" ", "_"): 1}
    strict = load_examples(settings_of(schema, file, on_bad_row="error", **limits), schema, pairs=True)
    place = f" in column {column}" if column else ""
    with pytest.raises(UserError, match=rf"a\.jsonl:1: bad row \w+: {reason}{place}"):
        list(strict)


def test_an_unsafe_or_bad_answer_is_put_where_rejected_ones_are(tmp_path: Path) -> None:
    """What a loss on unpaired answers reads; supervised fine-tuning drops and counts it."""
    for schema, row in (
        ("beavertails", {"prompt": "Why?", "response": "No.", "is_safe": False}),
        *(("custom", {"prompt": "Why?", "completion": "No.", "label": bad}) for bad in (False, "False", 0, "0", "bad")),
    ):
        examples = load_examples(settings_of(schema, write(tmp_path / "a.jsonl", [row])), schema)
        assert not list(examples)
        assert dict(examples.log.dropped) == {"empty_chosen": 1}
        assert SCHEMAS[schema].parse(row)["rejected"] == "No."


def test_pairings_and_margins() -> None:
    """Worked by hand: scores 1, 4, 4, 2."""
    answers = [Answer(text, score) for text, score in (("a", 1), ("b", 4), ("c", 4), ("d", 2))]
    assert [pair[:2] for pair in make_pairs(answers, "best_worst", 0)] == [("b", "a")]
    compared = [("b", "d"), ("b", "a"), ("c", "d"), ("c", "a"), ("d", "a")]  # b and c are equal
    assert [pair[:2] for pair in make_pairs(answers, "all", 0)] == compared
    assert [pair[:2] for pair in make_pairs(answers, "all", 3)] == [("b", "a"), ("c", "a")]


def test_pairs_of_one_row_have_ids_of_their_own(tmp_path: Path) -> None:
    row = {"id": "r" * 31, "prompt": "Why?", "responses": ["No.", "So.", "Maybe."], "scores": [1, 3, 2]}
    file = write(tmp_path / "a.jsonl", [row])
    ids = [one.id for one in load_examples(settings_of("custom", file, pairing="all"), "custom", pairs=True)]
    assert len(set(ids)) == 3
    assert all(len(id) <= 32 for id in ids)


def test_a_schema_without_pairs_and_a_file_without_its_columns_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "Why?", "text": "So."}])
    with pytest.raises(UserError, match=r"datasets=\[dolly\]: schema=dolly has no rejected responses"):
        load_examples(settings_of("dolly", file), "dolly", pairs=True)
    with pytest.raises(UserError, match=r"one of completions, chosen is needed: missing column completions"):
        list(load_examples(settings_of("ultrafeedback", file), "ultrafeedback", pairs=True))
    with pytest.raises(UserError, match=r"missing column response_j|one of answers, response_j"):
        list(load_examples(settings_of("se", file), "se", pairs=True))


def test_columns_of_other_names(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "Why?", "good": "So.", "bad": "No."}])
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert found(load_examples(settings_of("custom", file, columns=columns), "c", pairs=True), pairs=True) == [WHY]


SUFFIXES = [text + packed for text in ("csv", "json", "jsonl") for packed in ("", ".gz", ".zst")]


@pytest.mark.parametrize("suffix", [*SUFFIXES, "parquet", "arrow", "feather.arrow", "saved"])
def test_files_as_people_have_them(suffix: str, tmp_path: Path) -> None:
    """38 rows with two that are broken as the format allows it: no row at all, and one without an answer."""
    rows = [{**PAIR, "prompt": f'How {i}?\u2028\u00e9\nSo, "how"?'} for i in range(38)]
    mixed, broken = [*rows[:19], {**PAIR, "chosen": ""}, *rows[19:]], "empty_chosen"
    file, form = tmp_path / f"train.{suffix}", suffix.partition(".")[0]
    if form == "csv":
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerows([list(PAIR), *[list(row.values()) for row in mixed], ["one", "field", "too", "many"]])
        data, broken_too = text.getvalue(), "wrong_number_of_fields"
    elif form == "jsonl":
        data, broken_too = "".join(json.dumps(row) + "\n" for row in mixed) + "{\n", "broken_json"
    elif form == "json":
        data, broken_too = json.dumps([*mixed, 5], indent=1), "not_an_object"
    else:
        data, broken_too = "", "empty_rejected"
        whole = pyarrow.Table.from_pylist([*mixed, {**PAIR, "rejected": None}])
    if suffix.endswith(".gz"):
        file.write_bytes(gzip.compress(data.encode()))
    elif suffix.endswith(".zst"):
        with pyarrow.output_stream(str(file), compression="zstd") as out:
            out.write(data.encode())
    elif data:
        file.write_text(data, encoding="utf-8", newline="")
    elif suffix == "parquet":
        pyarrow.parquet.write_table(whole, file)
    elif suffix == "saved":
        datasets.Dataset(datasets.table.InMemoryTable(whole)).save_to_disk(file)
    else:
        writer = pyarrow.ipc.new_file if form == "feather" else pyarrow.ipc.new_stream
        with writer(str(file), whole.schema) as out:
            out.write_table(whole)
    place = file if suffix == "saved" else tmp_path  # a folder that `datasets` saved, or one that holds a file
    examples = load_examples(settings_of("custom", place), "custom", pairs=True)
    assert [one.instruction for one in examples] == [row["prompt"] for row in rows]
    assert dict(examples.log.dropped) == {broken: 1, broken_too: 1}
    assert examples.log.read == 40


def test_conversations_in_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"chosen": TALK + SO, "rejected": TALK + NO}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert found(load_examples(settings_of("custom", tmp_path), "c", pairs=True), pairs=True) == [TALKED]


def test_a_damaged_archive_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "zebra"}\n')[:20])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: not a readable jsonl\.gz file"):
        list(load_examples(settings_of("custom", tmp_path), "custom"))


def test_html_as_a_reader_sees_it() -> None:
    assert html_text("<p>Use <code>a &lt; b</code>.</p>\n<ul><li>One</li></ul>") == "Use a < b.\n\nOne"
    assert html_text("1 + 1") == "1 + 1"


@pytest.mark.parametrize("name", names.SCHEMAS)
def test_every_schema_is_a_choice_of_datasets(name: str) -> None:
    config = compose_config("config", [f"datasets=[{name}]", f"datasets.{name}.path=x", "loss=sft", "model=tiny"])
    assert config.datasets[name].schema == name


def test_multi_turn_pairs_reach_the_store_as_one_prompt(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(add_bos=True)
    file = write(tmp_path / "a.jsonl", [{"chosen": TALK + SO, "rejected": TALK + NO}])
    settings = settings_of("custom", file, template="vicuna", system="Be brief.", eval_fraction=0.0)
    stores = build_stores(
        {"c": settings}, loss="preference", tokenizer=tokenizer, max_length=256, max_prompt_length=200,
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    texts = [tokenizer.decode(segment) for segment in stores.train.row(0)]
    assert texts == ["<s>Be brief. USER: Hi ASSISTANT: Hello</s>USER: Why? ASSISTANT:", " So.</s>", " No.</s>"]
