from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import UserError
from config.settings import CorpusSettings, DatasetSettings
from safer_instruct.text.corpus import read_corpus
from safer_instruct.text.examples import held_out, in_shard, text_id
from safer_instruct.text.formats import BadLine, _batches
from safer_instruct.text.loading import load_examples
from safer_instruct.text.readers import read_rows, require_columns, splits_left_out

ROWS = [{"instruction": f'line one\nline {i}, "quoted"', "chosen": f"caf\u00e9 {i}\u2028"} for i in range(5)]
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_alpaca.json"


def write(path: Path, rows: list[dict]) -> Path:
    """The rows in the format that the file's name says."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet", "arrow"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert [row for _, row in read_rows(write(tmp_path / f"a.{suffix}", ROWS))] == ROWS


def test_where_is_the_line_that_the_row_starts_on(tmp_path: Path) -> None:
    csv_file, json_file = write(tmp_path / "a.csv", ROWS), write(tmp_path / "b.json", ROWS)
    assert [where for where, _ in read_rows(csv_file)][:3] == [f"{csv_file}:2", f"{csv_file}:4", f"{csv_file}:6"]
    lines = json_file.read_text().split("\n")
    for where, _ in read_rows(json_file):
        assert lines[int(where.rpartition(":")[2]) - 1].strip() == "{"


def test_a_json_list_longer_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"x": "y" * (i % 40), "n": [i, {"z": i}]} for i in range(300)]
    file = write(tmp_path / "a.json", rows)
    for size in (1, 7, 64):
        monkeypatch.setattr("safer_instruct.text.formats.JSON_CHUNK_CHARACTERS", size)
        assert [row for _, row in read_rows(file)] == rows


def test_folders(tmp_path: Path) -> None:
    for name in ("nsfw.csv", "hate.csv", "test_set.csv"):
        write(tmp_path / name, [{"name": name}])
    (tmp_path / "README.md").write_text("no data")
    assert [row["name"] for _, row in read_rows(tmp_path)] == ["hate.csv", "nsfw.csv"]
    made = tmp_path / "induced"
    (made / "ledger").mkdir(parents=True)
    write(made / "si.jsonl", ROWS)
    write(made / "ledger" / "induce-0.jsonl", [{"no": "data"}])
    write(made / "report.json", [{"no": "data"}])
    assert [row for _, row in read_rows(made)] == ROWS
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert [row for _, row in read_rows(tmp_path / "saved")] == ROWS
    datasets.DatasetDict({"b": datasets.Dataset.from_list(ROWS[:2])}).save_to_disk(tmp_path / "splits")
    assert [row for _, row in read_rows(tmp_path / "splits")] == ROWS[:2]


SECRET = "private text"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "a.csv: the file is empty"),
        ("a.csv", b"instruction,chosen\n", "a.csv: the file is empty"),
        ("a.json", b"[]", "a.json: the file is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl: the file is empty"),
        ("a.jsonl", b'{"a": "private text"}\n{"a": "private text\n', "a.jsonl:2: broken JSON"),
        ("a.jsonl", b'{"a": 1}\n["private text"]\n', "a.jsonl:2: a row must be a JSON object .* not a list"),
        ("a.json", b'[\n{"a": 1},\n{"a": "private text" "b"}\n]', "a.json:3: broken JSON"),
        ("a.json", b'[\n{"a": "private text"}\n', "a.json:3: broken JSON"),
        ("a.csv", b'a,b\n1,2\n"private text,3\n4,5\n', "a.csv:3: broken CSV quoting"),
        ("a.csv", b'a,b\n"private text"x,3\n', "a.csv:2: broken CSV quoting"),
        ("a.csv", b"a,b\n1,2\n1,private text,3\n", "a.csv:3: 3 fields where the header has 2"),
        ("a.csv", b"a,b\n1,2\nprivate text\xff,3\n", "a.csv:3: bytes that are not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n' * 9000 + b'{"a": "private text\xe9"}', "a.jsonl:9001: bytes that are not UTF-8"),
        ("a.parquet", b"private text", "a.parquet: not a readable parquet file"),
        ("a.json", b'{\n "rows": ["private text"]\n}', r"a.json:1: broken JSON.* one list of objects"),
        (
            "a.json",
            b'[{"a": 1}]\n{"a": "private text"}',
            r"a.json:1: the list of rows ends here, but the file does not",
        ),
        ("a.csv", b"a,b, a\n1,2,private text\n", "a.csv: two columns are called a"),
        ("a.txt", b"private text", "a data file ends in one of"),
    ],
)
def test_bad_files_say_where_and_never_what(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_rows(tmp_path / name))
    assert SECRET not in str(caught.value)


def test_missing_paths_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        read_rows(tmp_path / "nothing.csv")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UserError, match=r"no data file .* it holds notes\.md"):
        read_rows(tmp_path)


def test_a_utf8_signature_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfa,b\n1,2\n")
    assert [row for _, row in read_rows(tmp_path / "a.csv")] == [{"a": "1", "b": "2"}]
    for name, text in (("a.json", b'[{"a": 1}]'), ("b.json", b'{"a": 1}'), ("c.jsonl", b'{"a": 1}')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text)
        assert [row for _, row in read_rows(tmp_path / name)] == [{"a": 1}]


def test_require_columns_lists_what_it_found() -> None:
    require_columns(["a", "b"], ["a"], "f.csv")
    with pytest.raises(UserError, match=r"f\.csv: missing column chosen; the columns found are: instruction, safe"):
        require_columns(["instruction", "safe"], ["instruction", "chosen"], "f.csv")


@given(st.lists(st.text(st.characters(codec=None)), min_size=1, max_size=3))
def test_text_id_tells_texts_and_their_borders_apart(texts: list[str]) -> None:
    id = text_id(*texts)
    assert len(id) == 16
    assert int(id, 16) >= 0
    assert id == text_id(*texts)
    assert id != text_id(*texts, "")
    assert text_id("ab", "c") != text_id("a", "bc")


@given(st.text(), st.integers(1, 9))
def test_every_id_is_in_exactly_one_shard(id: str, count: int) -> None:
    assert sum(in_shard(id, index, count) for index in range(count)) == 1


def test_shards_are_about_equal_and_checked() -> None:
    sizes = [sum(in_shard(text_id(str(i)), index, 4) for i in range(2000)) for index in range(4)]
    assert min(sizes) > 400
    with pytest.raises(ValueError, match=r"0\.\.3"):
        in_shard("a", 4, 4)


def test_the_split_is_by_instruction_nested_and_close_to_the_fraction() -> None:
    texts = [f"Question {i}?" for i in range(4000)]
    small, large = ({t for t in texts if held_out(t, fraction)} for fraction in (0.05, 0.2))
    assert small < large
    assert 0.04 < len(small) / len(texts) < 0.06
    assert all(held_out(f"  {t.upper()}\n", 0.05) for t in small)
    assert not any(held_out(t, 0.0) for t in texts)
    assert all(held_out(t, 1.0) for t in texts)


@pytest.mark.skipif(not GSM8K.is_file(), reason="../shared/data/gsm8k_alpaca.json is not here")
def test_gsm8k_reads_as_json_does() -> None:
    assert [row for _, row in read_rows(GSM8K)] == json.loads(GSM8K.read_text())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "a.jsonl:2: JSON that is nested"),
        ("a.json", b'[{"a": 1},\n{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]", "a.json:2: JSON that is nested"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", "a.jsonl:1: JSON .* a number of too many digits"),
        ("a.json", b'[{"a": ' + b"9" * 5000 + b"}]", "a.json:1: JSON .* a number of too many digits"),
        ("a.csv", b"a,b\n1,2\n3,\x00\n", "a.csv:3: a NUL character"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-le"), "a.csv:1: a NUL character"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "a.csv:1: bytes that are not UTF-8"),
        ("a.jsonl", b'{"a": "' + b"x" * (1 << 25) + b'"}\n', "a.jsonl:1: a line of more than 33,554,432 characters"),
        ("a.json", b"[" + b" " * (1 << 26) + b"1]", "a.json:1: a row must be a JSON object"),
        ("a.json", b'[{"a": "' + b"x" * (3 << 24) + b'"}]', "a.json:1: broken JSON"),
        ("a.jsonl", b'{"a": "' + b"x" * ((1 << 24) + 1) + b'"}\n', "a.jsonl:1: a text of more than 16,777,216 char"),
        ("a.arrow", b"ARROW1\x00\x00private text", "a.arrow: not a readable arrow file"),
        ("a.arrow", b"\xff\xff\xff\xff\x10\x00\x00\x00private", "a.arrow: not a readable arrow file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_files_are_one_message(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(tmp_path / name))


def test_what_json_writes_is_read_as_it_was_written(tmp_path: Path) -> None:
    r"""A parser in C would refuse the first two, and read the third as "?"."""
    rows = [{"n": 12345678901234567890123}, {"n": float("inf")}, {"n": "half \ud800"}, {"n": 0.1}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert [row for _, row in read_rows(tmp_path / "a.json")] == rows
    (tmp_path / "b.json").write_text(json.dumps([{"n": float("nan"), "m": "a"}]))  # as pandas does
    assert [row for _, row in read_rows(tmp_path / "b.json")] == [{"n": None, "m": "a"}]


def test_broken_folders_of_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    (folder / "state.json").write_text("{")
    several = tmp_path / "several"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(several)
    (several / "train" / "state.json").unlink()
    for broken in (folder, several):
        with pytest.raises(UserError, match="a folder of `datasets` that cannot be read"):
            list(read_rows(broken))
    whole = tmp_path / "whole"
    datasets.Dataset.from_list(ROWS).save_to_disk(whole)
    (file,) = whole.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow: not a readable arrow file"):
        list(read_rows(whole))
    (whole / "state.json").write_text(json.dumps({"_data_files": [], "_indices_data_files": [{"filename": "x"}]}))
    with pytest.raises(UserError, match="a folder of `datasets` that cannot be read"):
        list(read_rows(whole))


def test_a_line_with_another_number_of_fields_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n1,2\n3\n"4,\n",5,6\n7,8\n')
    lines: list[BadLine] = []
    rows = list(read_rows(tmp_path / "a.csv", bad_line=lines.append))
    assert [row["a"] for _, row in rows] == ["1", "7"]
    assert [(line.where, line.reason) for line in lines] == [
        (f"{tmp_path}/a.csv:{number}", "wrong_number_of_fields") for number in (3, 4)
    ]


def test_nothing_is_trained_on_that_is_named_for_evaluation(tmp_path: Path) -> None:
    def names(*files: str) -> list[str]:
        folder = tmp_path / "-".join(files)
        folder.mkdir()
        for name in files:
            write(folder / name, [{"name": name}])
        everything = [row["name"] for _, row in read_rows(folder)]
        assert everything == sorted(files)
        trained = [row["name"] for _, row in read_rows(folder, training=True)]
        assert splits_left_out(folder) == [name for name in sorted(files) if name not in trained]
        return trained

    assert names("train.jsonl", "validation.jsonl", "test.jsonl") == ["train.jsonl"]
    assert names("train-0-of-2.csv", "train-1-of-2.csv", "test-0-of-1.csv") == ["train-0-of-2.csv", "train-1-of-2.csv"]
    assert names("hate.csv", "testimony.csv", "dev.csv") == ["hate.csv", "testimony.csv"]
    assert names("si_train.csv", "si_test.csv", "si-val-00000-of-00001.csv") == ["si_train.csv"]
    assert names("a.csv", "contest.csv", "my_test.csv", "a.holdout.csv", "Held-Out.csv") == ["a.csv", "contest.csv"]
    with pytest.raises(UserError, match=r"holds only dev\.csv, test\.csv"):
        names("dev.csv", "test.csv")
    splits = {name: datasets.Dataset.from_list([{"name": name}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    assert [row["name"] for _, row in read_rows(tmp_path / "splits", training=True)] == ["train"]
    assert splits_left_out(tmp_path / "splits") == ["test"]
    assert [row["name"] for _, row in read_rows(tmp_path / "splits" / "test", training=True)] == ["test"]


def test_columns_are_read_under_our_names(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "ask", "instruction": "old", "chosen": "a"}])
    assert [row for _, row in read_rows(file, columns={"instruction": "prompt"})] == [
        {"instruction": "ask", "chosen": "a"}
    ]
    with pytest.raises(UserError, match=r"to read another column in its place, write s\.columns\.instruction=Prompt$"):
        require_columns(["Prompt", "chosen"], ["instruction"], "f.csv", "s.columns")
    with pytest.raises(UserError, match=r"s\.columns\.instruction=INSTRUCTION s\.columns\.chosen=Chosen$"):
        require_columns(["INSTRUCTION", "Chosen"], ["instruction", "chosen"], "f.csv", "s.columns")
    (tmp_path / "blanks.csv").write_text('a, "b c" ,d\n1,2,3\n'.replace('"', ""))
    assert [row for _, row in read_rows(tmp_path / "blanks.csv")] == [{"a": "1", "b c": "2", "d": "3"}]
    with pytest.raises(UserError, match=r"found are: a\\u001b\[2J"):
        require_columns(["a\x1b[2J"], ["b"], "f.csv")
    names = {"instruction": "ask", "rejected": "bad_answr"}
    with pytest.raises(
        UserError,
        match=r"column bad_answr \(for rejected\); the columns found are: ask \(as instruction\), bad_answer$",
    ):
        require_columns(["instruction", "bad_answer"], ["instruction", "rejected"], "f.csv", "s.columns", names)
    for header in ("instruction;chosen", "instruction\tchosen"):  # as some spreadsheets write it
        with pytest.raises(UserError, match=r"a CSV file has commas between its columns$"):
            require_columns([header], ["instruction"], "f.csv", "s.columns")


def test_conversations_under_another_schema_are_told_where_they_belong(tmp_path: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
    file = write(tmp_path / "talks.jsonl", [talk])
    pair = write(tmp_path / "pairs.jsonl", [{"prompt": talk["messages"][:1], "chosen": talk["messages"][1:]}])
    for path, column, schema in ((file, "messages", "sharegpt"), (pair, "prompt", "custom")):
        words = rf"column {column} holds conversations, which schema=si does not read: write datasets=\[{schema}\]"
        with pytest.raises(UserError, match=words):
            list(load_examples(DatasetSettings(path=str(path), schema="si"), "si"))
        assert len(list(load_examples(DatasetSettings(path=str(path), schema=schema), schema))) == 1
    with pytest.raises(UserError, match=r"missing column response; .* write corpus\.columns\.response=messages$"):
        read_corpus(CorpusSettings(str(file)))
    settings = CorpusSettings(str(file), columns={"response": "messages"})
    assert [one.rejected for one in read_corpus(settings).examples] == ["So."]


def test_blanks_in_a_json_list_are_skipped_at_any_border_of_the_buffer(tmp_path: Path, monkeypatch) -> None:
    """Gigabytes of them cost time in proportion: none are kept."""
    file = tmp_path / "a.json"
    file.write_text('[\n{"a": 1}' + " \n" * 50 + "," + "\n\t" * 50 + '{"a": 2}' + "\n" * 99 + "]")
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr("safer_instruct.text.formats.JSON_CHUNK_CHARACTERS", size)
        found = [(where.rpartition(":")[2], row["a"]) for where, row in read_rows(file)]
        assert found == [("2", 1), ("102", 2)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.parquet", r"a\.parquet: a row group of .* GiB.*row_group_size"),
        ("a.arrow", r"a\.arrow: a record batch of .* GiB.*max_chunksize"),
        ("saved", r"data-00000-of-00001\.arrow: a record batch of .* GiB.*max_chunksize"),
    ],
)
def test_a_part_of_a_table_that_would_fill_the_memory_is_refused(name, message, tmp_path: Path, monkeypatch) -> None:
    file, rows = tmp_path / name, [{"a": "x" * 99 + str(i)} for i in range(50)]
    if name == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(file)
    else:
        write(file, rows)
    place = file / "data-00000-of-00001.arrow" if name == "saved" else file
    assert list(read_rows(file)) == [(f"{place}:{number}", row) for number, row in enumerate(rows, start=1)]
    monkeypatch.setattr("safer_instruct.text.formats.MAX_GROUP_BYTES", 1000)
    with pytest.raises(UserError, match=message):
        list(read_rows(file))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_of_a_few_bytes_that_would_become_gigabytes_is_refused(
    suffix: str, tmp_path: Path, monkeypatch
) -> None:
    """One text of 1 MB in a dictionary, 20,000 times: 20 GB. Refused after what may be held, a few rows at a time."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20_000, pyarrow.int32()), ["y" * 1_000_000])
    file, table = tmp_path / f"a.{suffix}", pyarrow.table({"a": column})
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, file, compression="zstd")
        assert file.stat().st_size < 2000
    else:
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    monkeypatch.setattr("safer_instruct.text.formats.MAX_GROUP_BYTES", 4_000_000)
    monkeypatch.setattr("safer_instruct.text.formats.MIN_TABLE_CHARACTERS", 1 << 25)
    monkeypatch.setattr("safer_instruct.text.formats.MAX_TABLE_EXPANSION", 10)
    before = pyarrow.total_allocated_bytes()
    rows = read_rows(file)
    for _ in range(33):
        next(rows)
        assert pyarrow.total_allocated_bytes() - before < 10_000_000
    with pytest.raises(UserError, match=rf"a\.{suffix}:34: the texts up to here are more than .*JSONL"):
        next(rows)


DISTINCT, EQUAL = [f"{i:09d}" * 10 for i in range(1000)], ["y" * 50_000] * 1000


@pytest.mark.parametrize("page", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(
    ("encoding", "values", "rows"),
    [
        ({"dictionary_pagesize_limit": 1000, "write_batch_size": 10}, DISTINCT, 256),  # a dictionary, given up at 1 kB
        ({"use_dictionary": False}, DISTINCT, 256),
        ({}, EQUAL, 10),  # a dictionary of one value
        ({"use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"}}, EQUAL, 10),
    ],
)
def test_a_large_row_group_is_read_many_rows_at_a_time_unless_each_row_may_be_large(
    encoding, values, rows, page, compression, tmp_path: Path, monkeypatch
) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"n": [0] * 1000, "a": values})
    pyarrow.parquet.write_table(table, file, data_page_version=page, compression=compression, **encoding)
    monkeypatch.setattr("safer_instruct.text.formats.MAX_GROUP_BYTES", 550_000)
    assert [batch.num_rows for batch in _batches(file)][:-1] == [rows] * (-(-1000 // rows) - 1)
    assert [row["a"] for _, row in read_rows(file)] == values


INDICES = pyarrow.array([0] * 1000, pyarrow.int32())


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize(
    ("column", "rows"),
    [
        (pyarrow.array(DISTINCT), 256),
        (pyarrow.array([[{"a": text}] for text in DISTINCT]), 256),
        (pyarrow.DictionaryArray.from_arrays(INDICES, EQUAL[:1]), 10),
        (pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([1000], pyarrow.int32()), EQUAL[:1]), 10),
        (pyarrow.StructArray.from_arrays([pyarrow.DictionaryArray.from_arrays(INDICES, EQUAL[:1])], ["b"]), 10),
    ],
)
def test_a_large_record_batch_is_read_as_a_row_group_is(column, rows, compression, tmp_path: Path, monkeypatch) -> None:
    file, table = tmp_path / "a.arrow", pyarrow.table({"n": [0] * 1000, "a": column})
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    monkeypatch.setattr("safer_instruct.text.formats.MAX_GROUP_BYTES", 550_000)
    assert [batch.num_rows for batch in _batches(file)][:-1] == [rows] * (-(-1000 // rows) - 1)
    assert [row["a"] for _, row in read_rows(file)] == column.to_pylist()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_column_that_is_nested_without_end_is_one_message(suffix: str, tmp_path: Path) -> None:
    column = pyarrow.array(["x"])
    for _ in range(60):
        column = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1], pyarrow.int32()), column)
    table, file = pyarrow.table({"a": column}), tmp_path / f"a.{suffix}"
    if suffix == "parquet":  # pyarrow writes more levels than it reads
        pyarrow.parquet.write_table(table, file)
        with pytest.raises(UserError, match=r"a\.parquet: not a readable parquet file"):
            list(read_rows(file))
    else:
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        assert len(list(read_rows(file))) == 1
