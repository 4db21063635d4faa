"""What people bring, and nobody had thought of: the right value, or one message with the words that work."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from config.errors import UserError
from config.rules import existing_path, hub_path, path_or_none
from config.schema import compose_config
from config.settings import DatasetSettings, DuplicatesSettings
from safer_instruct.dataset.audit import audit
from safer_instruct.dataset.reviews import FORMAT, read_reviews
from safer_instruct.dataset.similarity import LeakageGuard
from safer_instruct.text import formats
from safer_instruct.text.arrow_sizes import largest_unpacked
from safer_instruct.text.hub import source_of
from safer_instruct.text.loading import load_examples
from safer_instruct.text.readers import data_files, read_rows
from scripts.runs import read_status
from tests.commands import errors_of

PAIR = {"instruction": "Why?", "chosen": "So.", "rejected": "No."}
TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, schema: str = "si", *, pairs: bool = True, **settings: Any) -> tuple[list[Any], Any]:
    examples = load_examples(DatasetSettings(str(path), schema, **settings), schema, pairs=pairs)
    return [(one.instruction, one.chosen, one.rejected) for one in examples], examples.log


def test_a_folder_is_read_as_a_whole_or_refused(tmp_path: Path) -> None:
    good = lines(tmp_path / "a.jsonl", PAIR)
    for name in ("dataset_infos.json", "README.md", "LICENSE", "_SUCCESS", ".a.jsonl.crc", "._a.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert data_files(tmp_path) == [good]
    (tmp_path / "more").mkdir()
    (tmp_path / "b.jsonl.xz").write_bytes(b"x")
    assert source_of("si", DatasetSettings(str(tmp_path), "si")).others == ["b.jsonl.xz", "more"]
    odd = tmp_path / "c.parquet"
    for make in (odd.mkdir, lambda: odd.symlink_to(tmp_path / "nowhere"), lambda: os.mkfifo(odd)):
        make()
        with pytest.raises(UserError, match=r"c\.parquet: no file, but a folder, a pipe or a link that leads nowhere"):
            data_files(tmp_path)
        odd.rmdir() if odd.is_dir() else odd.unlink()
    os.mkfifo(tmp_path / "pipe.jsonl.fifo")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        data_files(tmp_path / "pipe.jsonl.fifo")


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["train-00000-of-00002.jsonl"], r"train-\*-of-00002\.jsonl: 1 of 2 files"),
        (["a-1-of-3.jsonl", "a-3-of-3.jsonl"], r"a-\*-of-3\.jsonl: 2 of 3 files"),
        (["a-1-of-2.jsonl", "a-2-of-2.jsonl"], ""),
        (["train-0-of-1.jsonl", "test-0-of-2.jsonl"], ""),  # what is not read may be a part
    ],
)
def test_shards_that_are_not_there(names: list[str], missing: str, tmp_path: Path) -> None:
    for name in names:
        lines(tmp_path / name, PAIR)
    if missing:
        with pytest.raises(UserError, match=missing):
            data_files(tmp_path, training=True)
    else:
        assert data_files(tmp_path, training=True)


def test_a_list_of_rows_by_any_name_and_a_key_that_stands_twice(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text(json.dumps([PAIR, PAIR], indent=1))
        assert [row for _, row in read_rows(tmp_path / name)] == [PAIR, PAIR]
    (tmp_path / "b.jsonl").write_text('{"instruction": "x", "instruction": "y", "chosen": "a", "rejected": "b"}\n')
    assert read(tmp_path / "b.jsonl")[1].dropped == {"broken_json": 1}
    (tmp_path / "b.json").write_text('[{"a": {"b": 1, "b": 2}}]')
    with pytest.raises(UserError, match="twice"):
        list(read_rows(tmp_path / "b.json"))


def test_csv_as_people_type_it(tmp_path: Path) -> None:
    """Quotes behind a blank are quotes; a header that is none is not quoted at length; a faulty line says its fault."""
    file = tmp_path / "a.csv"
    file.write_text('instruction, chosen, rejected\nWhy?, "So, so.", "No."\n')
    assert read(file)[0] == [("Why?", "So, so.", "No.")]
    file.write_text("zebra " * 99 + ",b\nc,d\n")
    with pytest.raises(UserError) as error:
        read(file)
    assert len(str(error.value)) < 300 + len(str(file))
    file.write_text("instruction,chosen,rejected\na\n")
    assert "1 fields where the header has 3" in read(file)[1].why["wrong_number_of_fields"]


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null", "NA", "<NA>"])
def test_a_word_for_nothing_is_noted(word: str, tmp_path: Path) -> None:
    """It may be an answer, so it stays; "Nan is my aunt" is no such word."""
    rows = [{**PAIR, "rejected": word}, {**PAIR, "rejected": "Nan is my aunt"}, {**PAIR, "input": word}]
    found, log = read(lines(tmp_path / "a.jsonl", *rows))
    assert len(found) == 3
    assert log.counts == {"a_text_is_a_word_for_a_missing_value": 2}


def write_table(file: Path, table: pyarrow.Table, **options: Any) -> Path:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        writer = pyarrow.ipc.new_file if file.stem == "file" else pyarrow.ipc.new_stream
        with writer(str(file), table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as out:
            out.write_table(table)
    return file


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_tables_that_no_row_can_hold(name: str, tmp_path: Path) -> None:
    good = pyarrow.Table.from_pylist([PAIR])
    for type, value in (
        (pyarrow.timestamp("s"), 10**15), (pyarrow.timestamp("s", tz="Nowhere/Land"), 1), (pyarrow.date32(), 10**8),
    ):  # fmt: skip
        table = good.append_column("at", pyarrow.array([value], type))
        with pytest.raises(UserError, match=r"a value that Python cannot hold .*; leave out its column"):
            list(read_rows(write_table(tmp_path / name, table)))
    twice = pyarrow.Table.from_arrays([good["chosen"], good["rejected"]], names=["chosen", "chosen"])
    with pytest.raises(UserError, match="two columns are called chosen"):
        list(read_rows(write_table(tmp_path / name, twice)))


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow"])
def test_a_compressed_batch_is_measured_before_it_is_unpacked(
    codec: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pyarrow.Table.from_pylist([{**PAIR, "rejected": "x" * 1_000_000}, PAIR])
    table = table.append_column("d", pyarrow.array(["a" * 500_000] * 2).dictionary_encode())
    file = write_table(tmp_path / name, table, compression=codec)
    with pyarrow.memory_map(str(file)) as source:
        assert largest_unpacked(source) == pytest.approx(1_000_000, rel=0.001)
    assert len(list(read_rows(file))) == 2
    monkeypatch.setattr(formats, "MAX_GROUP_BYTES", 900_000)
    monkeypatch.setattr(pyarrow.ipc, "open_stream", lambda source: pytest.fail("unpacked"))
    with pytest.raises(UserError, match="a record batch of"):
        list(read_rows(file))
    plain = write_table(tmp_path / f"{Path(name).stem}.arrow", table)
    with pyarrow.memory_map(str(plain)) as source:
        assert largest_unpacked(source) == 0


# schema, a row as a published dataset has it -> what is read of it by the words of the message
RENAMED: list[tuple[str, dict[str, Any], tuple[str, str, str | None]]] = [
    ("custom", {"system": "S", "question": "Why?", "chosen": "It is so.", "rejected": "It is no."},
     ("Why?", "It is so.", "It is no.")),  # orca_dpo_pairs: the answers' first words were taken for the prompt
    ("custom", {"instruction": "Why?", "generations": ["So.", "No."], "ratings": [5, 1]}, ("Why?", "So.", "No.")),
    ("custom", {"conversation": TALK, "turn": 1}, ("Why?", "So.", None)),  # LMSYS-Chat-1M
    ("sharegpt", {"conversation": TALK, "turn": 1}, ("Why?", "So.", None)),
    ("si", {"conversation": TALK, "turn": 1}, ("Why?", "So.", None)),
    ("sharegpt", {"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "No."}]},
     ("Why?", "So.", "No.")),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "row", "expected"), RENAMED)
def test_the_words_of_a_message_work(
    schema: str, row: dict[str, Any], expected: tuple[str, str, str | None], tmp_path: Path
) -> None:
    """The command that the message gives is typed, and reads the row."""
    file, pairs = lines(tmp_path / "a.jsonl", row), expected[2] is not None
    with pytest.raises(UserError) as error:
        read(file, schema, pairs=pairs and schema != "sharegpt")
    words = re.findall(r"datasets(?:\.\S+)?=\S+", str(error.value))
    name = schema if not words[0].startswith("datasets=") else words[0][len("datasets=[") : -1]
    given = [f"datasets=[{name}]", f"datasets.{name}.path={file}", "loss=sft", "model=tiny", "exp_name=a"]
    settings = compose_config("config", [*given, *words]).datasets[name]
    examples = load_examples(settings, name, pairs=pairs)
    assert [(one.instruction, one.chosen, one.rejected) for one in examples] == [expected]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"weight": 0}, "unread_weight"),
        ({"tool_calls": [{"id": "1"}]}, "unread_tool_calls"),
        ({"content": [{"type": "text"}]}, "not_text"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, "not_text"),
        ({"weight": 1, "tool_calls": None, "name": "Bob"}, ""),
    ],
)
def test_what_a_message_says_beside_its_text(extra: dict[str, Any], reason: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "a.jsonl", {"messages": [TALK[0], TALK[1] | extra]})
    found, log = read(file, "sharegpt", pairs=False)
    assert found == ([] if reason else [("Why?", "So.", None)])
    assert log.dropped == ({reason: 1} if reason else {})


def test_the_safer_of_two_unsafe_answers_is_none_to_imitate(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "response_0": "No.", "response_1": "So.", "is_response_0_safe": False}
    for safer, is_safe in ((1, False), ("1", "False"), (1.0, 0)):
        file = lines(tmp_path / "a.jsonl", {**row, "safer_response_id": safer, "is_response_1_safe": is_safe})
        assert read(file, "beavertails")[0] == [("Why?", "So.", "No.")]
        found, log = read(file, "beavertails", pairs=False)
        assert (found, log.dropped) == ([], {"unsafe_chosen": 1})


def test_paths_that_are_none() -> None:
    assert existing_path("") == hub_path("") == "is empty; a variable that is not set?"
    assert path_or_none("") == ""
    for address in ("https://example.com/a.jsonl", "s3://bucket/a", "hf://datasets/a/b"):
        assert "addresses are not read: download it" in hub_path(address)
    assert "no such file" in existing_path("~nobody-of-this-name/a.jsonl")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("~model", "~model: model cannot be removed"),
        ("~datasets.si.path", "~datasets.si.path: datasets.si.path cannot be removed"),
        ("model=null", "model has no choice 'null'"),
        ("lr=???", "lr is not set"),
        ("datasets.si.labels=[[a]]", "must hold single values"),
        ("datasets.si.columns={a:{b:c}}", "must hold single values"),
        ("seed=99999999999999999999", "must lie in [0, 9.2e18]"),
        ("datasets.si.path=", "datasets.si.path=: is empty"),
        ("model.archive=", "model.archive=: is empty"),
        ("optimizer_args.x=" + "[" * 500, "not a valid override"),
        ("batch_size=" + "9" * 5000, "not a valid override"),
        ("lr=glob(*)", "lr=glob(*): glob chooses among the files of a group"),
        ("--config-name=induce", "--config-name is not for this program"),
        ("--experimental-rerun=a.pickle", "--experimental-rerun is not for this program"),
        ("model.archive=" + "a" * 300, "File name too long"),
    ],
)
def test_words_of_a_command(
    argument: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["model=tiny", "loss=dpo", "exp_name=a", f"datasets.si.path={lines(tmp_path / 'a.jsonl', PAIR)}"]
    more = ["-m"] if "glob" in argument else []
    assert message in "\n".join(errors_of([*command, *more, argument], monkeypatch, capsys))


@pytest.mark.parametrize("path", ["runs/lr=0.1/LATEST", "ü.jsonl", "a(1).jsonl", "a'b.jsonl", "$a;b#.jsonl"])
def test_the_quoted_word_of_a_message_is_the_value(path: str) -> None:
    base = ["loss=dpo", "model=tiny", "exp_name=a"]
    with pytest.raises(UserError) as error:
        compose_config("config", [*base, f"datasets.si.path={path}"])
    (word,) = shlex.split(str(error.value).split("; as text: ")[1])
    assert compose_config("config", [*base, word]).datasets["si"].path == path


def test_columns_and_paths_of_a_chosen_dataset() -> None:
    words = ["loss=dpo", "model=tiny", "exp_name=a", "datasets=[custom]", "datasets.custom=a.jsonl"]
    config = compose_config("config", [*words, "datasets.custom.columns={prompt:question,chosen:good}"])
    assert config.datasets["custom"].columns == {"prompt": "question", "chosen": "good"}
    assert config.datasets["custom"].path == "a.jsonl"
    assert compose_config("config", [*words, "datasets.custom={path:b.jsonl}"]).datasets["custom"].path == "b.jsonl"


def test_an_audit_writes_what_it_was_given_or_says_what_is_no_text(tmp_path: Path) -> None:
    def cleaned(row: dict[str, Any]) -> dict[str, Any]:
        lines(tmp_path / "a.jsonl", row)
        audit(
            str(tmp_path / "a.jsonl"), guard=LeakageGuard((), None), duplicates=DuplicatesSettings(),
            max_same_chosen=None, output=tmp_path / "out", format="jsonl",
        )  # fmt: skip
        found: dict[str, Any] = json.loads((tmp_path / "out" / "si.jsonl").read_text())
        return found

    assert cleaned({**PAIR, "provenance": "from the web"})["provenance"] == {"source": "from the web"}
    assert cleaned({**PAIR, "provenance": '{"a": 1}'})["provenance"] == {"a": 1}
    broken = cleaned({**PAIR, "id": "\ud800", "label": "\ud800", "chosen": "So \ud800"})
    assert (broken["id"], broken["label"], broken["chosen"]) == ("\\ud800", "\\ud800", "So \\ud800")
    with pytest.raises(UserError, match=r"a\.jsonl:1: the column chosen holds a list, not a text"):
        cleaned({**PAIR, "chosen": TALK})


@pytest.mark.parametrize("change", [{"id": ["1"]}, {"label": None}, {"pair": 5}, {"decision": ["keep"]}])
def test_reviews_that_are_none(change: dict[str, Any], tmp_path: Path) -> None:
    decision = {"id": "1", "pair": "p", "label": "l", "whole": True, "decision": "keep"}
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"format": FORMAT, "decisions": [decision | change]}))
    with pytest.raises(UserError, match="is not an export of a review page"):
        read_reviews([str(file)])
    for text in ("[" * 100_000, '{"format": ' + "9" * 5000 + "}"):
        file.write_text(text)
        with pytest.raises(UserError, match="is not an export of a review page"):
            read_reviews([str(file)])


def test_a_run_whose_files_are_folders(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("n_examples: 4\nn_epochs: 1\n")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / ".lock.holder").mkdir()
    with pytest.raises(UserError, match=r"not as train\.py wrote them"):
        read_status(tmp_path, 0.0)
