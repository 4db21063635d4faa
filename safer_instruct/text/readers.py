"""Rows of files: CSV, JSON, JSONL, Parquet, arrow, and folders of `datasets`, one row at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from config.errors import UserError

Row = dict[str, Any]


DATA_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".arrow")


DATASET_FILES = ("si.jsonl", "si.parquet")  # what induce.py calls its dataset: the rest of such a folder is not data


NOT_DATA = frozenset({"report.json", "manifest.json", "dataset_info.json", "state.json", "test_set.csv"})


MAX_CSV_FIELD_CHARACTERS = 1 << 24  # a longer field is an unclosed quote, not a text


JSON_CHUNK_CHARACTERS = 1 << 20


PARQUET_ROWS = 1024


def require_columns(columns: Collection[str], needed: Collection[str], where: str | Path) -> None:
    """Raise a UserError that lists the columns found, unless all `needed` are among them."""
    missing = [name for name in needed if name not in columns]
    if missing:
        found = ", ".join(str(name) for name in columns) or "none"
        raise UserError(f"{where}: missing column {', '.join(missing)}; the columns found are: {found}")


def data_files(path: Path) -> list[Path]:
    """The files that `read_rows(path)` reads, sorted by name; for a `datasets` folder, its arrow files.

    Raises:
        UserError: `path` does not exist, or holds no data file.
    """
    if path.is_file():
        if path.suffix.lower() not in DATA_SUFFIXES:
            raise UserError(f"{path}: a data file ends in one of {', '.join(DATA_SUFFIXES)}")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    for name in DATASET_FILES:
        if (path / name).is_file():
            return [path / name]
    if _is_datasets_folder(path):
        files = sorted(path.rglob("*.arrow"))
    else:
        files = sorted(
            file
            for file in path.iterdir()
            if file.is_file() and file.suffix.lower() in DATA_SUFFIXES
            if file.name not in NOT_DATA and file.name[0] not in "._"
        )
    if not files:
        found = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
        raise UserError(f"{path}: no data file ({', '.join('*' + s for s in DATA_SUFFIXES)}) in it; it holds {found}")
    return files


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Stream the rows of a file or of all data files of a folder, each with the place that it came from.

    Reads CSV (with a header), JSON (a list of objects), JSONL, Parquet, arrow, and a folder that `datasets` saved; a
    folder made by induce.py yields its dataset alone. No file is ever held in memory as a whole.

    Args:
        path: File or folder.

    Returns:
        (where, row) pairs; `where` is "file:line" (the line that the row starts on), for Parquet and arrow the row.

    Raises:
        UserError: missing path (at once); empty file, broken JSON or CSV, bytes that are not UTF-8 (while reading).
    """
    path = Path(path)
    files = data_files(path)
    if path.is_dir() and _is_datasets_folder(path):
        return _read_datasets_folder(path)
    return (pair for file in files for pair in _read_file(file))


def _read_file(file: Path) -> Iterator[tuple[str, Row]]:
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
    readers |= {".parquet": _read_parquet, ".arrow": _read_arrow}
    found = False
    try:
        for number, row in readers[file.suffix.lower()](file):
            found = True
            yield f"{file}:{number}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{_first_bad_line(file)}: bytes that are not UTF-8; convert the file to UTF-8") from error
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file}: not a readable {file.suffix[1:]} file") from error
    if not found:
        raise UserError(f"{file}: the file is empty; it must hold at least one row")


def _first_bad_line(file: Path) -> str:
    """Place of the first line that is not UTF-8 (a decoder reads ahead, so its own position is of little use)."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"{file}:{number}"
    return str(file)


def _read_csv(file: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a CSV file with the line that each starts on (a quoted field may span lines)."""
    csv.field_size_limit(MAX_CSV_FIELD_CHARACTERS)
    line = 1
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for values in reader:
                if values:
                    if len(values) != len(header):
                        raise UserError(
                            f"{file}:{line}: {len(values)} fields where the header has {len(header)}; "
                            "quote every field that holds a comma, a quote or a line break"
                        )
                    yield line, dict(zip(header, values, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{file}:{line}: broken CSV quoting in the record that starts here ({error}); write a quote inside "
                'a quoted field as ""'
            ) from error


def _read_jsonl(file: Path) -> Iterator[tuple[int, Row]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{file}:{number}: broken JSON: {error.msg} at column {error.colno}; a file holds one object "
                        "a line, or (in a .json file) one list of objects"
                    ) from error
                yield number, _object(row, file, number)


def _object(row: object, file: Path, line: int) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{file}:{line}: a row must be a JSON object with named fields, not a {type(row).__name__}")
    return row


def _read_json(file: Path) -> Iterator[tuple[int, Row]]:
    """Objects of a JSON list, parsed one at a time; a file that does not start with "[" is read as JSONL."""
    decoder = json.JSONDecoder()
    with file.open(encoding="utf-8-sig") as source:
        text = source.read(JSON_CHUNK_CHARACTERS).lstrip("\n\r\t ")
        if text[:1] != "[":
            yield from _read_jsonl(file)
            return
        source.seek(0)
        text = source.read(JSON_CHUNK_CHARACTERS)
        position, line, first = text.index("[") + 1, 1 + text[: text.index("[")].count("\n"), True
        while True:
            chunk = source.read(JSON_CHUNK_CHARACTERS)
            text, position = text[position:] + chunk, 0
            while True:  # items that lie in the buffer as a whole
                start = _skip(text, position, "" if first else ",")
                if text[start : start + 1] == "]":
                    return
                try:
                    row, end = decoder.raw_decode(text, start)
                except json.JSONDecodeError as error:
                    if chunk:
                        break  # perhaps cut off by the end of the buffer: read on
                    broken = line + text.count("\n", position, error.pos)
                    raise UserError(f"{file}:{broken}: broken JSON: {error.msg}") from error
                line += text.count("\n", position, start)
                yield line, _object(row, file, line)
                line, position, first = line + text.count("\n", start, end), end, False


def _skip(text: str, position: int, separator: str) -> int:
    """Position of the next item: behind whitespace and at most one separator."""
    while position < len(text) and text[position] in " \n\r\t":
        position += 1
    if separator and text.startswith(separator, position):
        return _skip(text, position + 1, "")
    return position


def _read_parquet(file: Path) -> Iterator[tuple[int, Row]]:
    number = 0
    with pyarrow.parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _read_arrow(file: Path) -> Iterator[tuple[int, Row]]:
    """Rows of an arrow file: the stream format that `datasets` writes, or the file format."""
    number = 0
    with pyarrow.memory_map(str(file)) as source:
        try:
            batches: Iterator[pyarrow.RecordBatch] = iter(pyarrow.ipc.open_stream(source))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, PARQUET_ROWS):
                for row in batch.slice(start, PARQUET_ROWS).to_pylist():
                    number += 1
                    yield number, row


def _is_datasets_folder(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _read_datasets_folder(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk` (all its splits)."""
    import datasets  # slow to import, and most datasets are files

    loaded = datasets.load_from_disk(str(path))
    splits = sorted(loaded.items()) if isinstance(loaded, datasets.DatasetDict) else [("", loaded)]
    if not any(len(split) for _, split in splits):
        raise UserError(f"{path}: the dataset is empty; it must hold at least one row")
    for name, split in splits:
        for number, row in enumerate(split, start=1):
            yield f"{path / name}:{number}", dict(row)
