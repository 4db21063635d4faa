"""One reader for each format of a data file: its rows, with the line that each starts on."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from config.errors import UserError

Row = dict[str, Any]

MAX_TEXT_CHARACTERS = 1 << 24  # a longer one is an unclosed quote or a damaged file, not a text
MAX_LINE_CHARACTERS = 2 * MAX_TEXT_CHARACTERS  # of JSON, where a row may hold several texts
JSON_CHUNK_CHARACTERS = 1 << 20
TABLE_ROWS = 64  # of a table at a time: each may hold a text of MAX_TEXT_CHARACTERS


class BadLine(UserError):
    """One row that cannot be read, in a file that can be read on behind it.

    Attributes:
        where: file:line.
        reason: A word for the counts.
    """

    def __init__(self, where: str, reason: str, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self.where, self.reason = where, reason


def refuse(line: BadLine) -> None:
    """Raise what is wrong with a row."""
    raise line


def read_file(file: Path) -> Iterator[tuple[str, Row | BadLine]]:
    """Yield ("file:line", row) of a data file; see `readers.read_rows`."""
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Row | BadLine]]]] = {
        ".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_table, ".arrow": _read_table,
    }  # fmt: skip
    found = False
    try:
        for number, row in readers[file.suffix.lower()](file):
            found = True
            yield f"{file}:{number}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{_first_bad_line(file)}: bytes that are not UTF-8; convert the file to UTF-8") from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise UserError(f"{file}: not a readable {file.suffix[1:]} file{reason}") from error
    if not found:
        raise UserError(f"{file}: the file is empty; it must hold at least one row")


def _first_bad_line(file: Path) -> str:
    """Return the place of the first line that is not UTF-8: a decoder reads ahead, so its own position is of no use."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"{file}:{number}"
    return str(file)


def _read_csv(file: Path) -> Iterator[tuple[int, Row | BadLine]]:
    """Yield the rows of a CSV file with the line that each starts on (a quoted field may span lines)."""
    csv.field_size_limit(MAX_TEXT_CHARACTERS)
    line = 1
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(_without_nul(lines, file), strict=True)
        try:
            header = next(reader, [])
            line = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(header):
                    yield (
                        line,
                        BadLine(
                            f"{file}:{line}",
                            "wrong_number_of_fields",
                            f"{len(values)} fields where the header has {len(header)}; quote every field that holds a "
                            "comma, a quote or a line break",
                        ),
                    )
                elif values:
                    yield line, dict(zip(header, values, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{file}:{line}: broken CSV quoting in the record that starts here ({error}); write a quote inside "
                'a quoted field as ""'
            ) from error


def _without_nul(lines: Iterable[str], file: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise UserError(f"{file}:{number}: a NUL character; the file is damaged, or is UTF-16: convert it to UTF-8")
        yield line


def _read_jsonl(file: Path) -> Iterator[tuple[int, Row]]:
    with file.open(encoding="utf-8-sig") as lines:
        # readline with a limit: a file without line breaks is not read into memory as a whole.
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_CHARACTERS), ""), start=1):
            if len(line) == MAX_LINE_CHARACTERS:
                raise UserError(f"{file}:{number}: a line of more than {len(line):,} characters")
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{file}:{number}: broken JSON: {error.msg} at column {error.colno}; a file holds one object "
                        "a line, or (in a .json file) one list of objects"
                    ) from error
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{file}:{number}: {_TOO_MUCH_JSON}") from error
                yield number, _object(row, file, number)


_TOO_MUCH_JSON = "JSON that is nested too deeply, or a number of too many digits"


def _object(row: object, file: Path, line: int) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{file}:{line}: a row must be a JSON object with named fields, not a {type(row).__name__}")
    return row


def _read_json(file: Path) -> Iterator[tuple[int, Row]]:
    """Yield the objects of a JSON list, parsed one at a time; a file that does not start with "[" is read as JSONL.

    Why not `ijson`: its C parser turns half of a surrogate pair into "?" without a word (here such a row is counted),
    refuses NaN, which json writes, tells no line, crashed on an integer of 5,000 digits, and 200 kB of brackets took
    8 GB.
    """
    decoder = json.JSONDecoder()
    with file.open(encoding="utf-8-sig") as source:
        text = source.read(JSON_CHUNK_CHARACTERS)
        position = _next_item(text, 0)
        if text[position : position + 1] != "[":
            yield from _read_jsonl(file)
            return
        line, position = 1 + text.count("\n", 0, position), position + 1
        while True:
            start = _next_item(text, position)
            if text[start : start + 1] == "]":
                return
            try:
                row, end = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:
                chunk = source.read(JSON_CHUNK_CHARACTERS)
                if not chunk or len(text) - position > MAX_LINE_CHARACTERS:
                    broken = line + text.count("\n", position, error.pos)
                    raise UserError(f"{file}:{broken}: broken JSON: {error.msg}") from error
                text, position = text[position:] + chunk, 0  # perhaps the item goes on behind the end of `text`
                continue
            except (ValueError, RecursionError) as error:
                line += text.count("\n", position, start)
                raise UserError(f"{file}:{line}: {_TOO_MUCH_JSON}") from error
            line += text.count("\n", position, start)
            yield line, _object(row, file, line)
            line, position = line + text.count("\n", start, end), end


def _next_item(text: str, position: int) -> int:
    """Return where the next item of a list begins: behind blanks and at most one comma."""
    return _BEFORE_ITEM.match(text, position).end()  # type: ignore[union-attr]  # it matches anything


_BEFORE_ITEM = re.compile(r"[ \n\r\t]*,?[ \n\r\t]*")


def _read_table(file: Path) -> Iterator[tuple[int, Row]]:
    rows = chain.from_iterable(batch.to_pylist() for batch in _batches(file))
    return enumerate(rows, start=1)


def _batches(file: Path) -> Iterator[pyarrow.RecordBatch]:
    """Yield the batches of a Parquet file, or of an arrow file: the stream that `datasets` writes, or Feather."""
    if file.suffix.lower() == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=TABLE_ROWS)
        return
    with pyarrow.memory_map(str(file)) as source:
        try:
            batches: Iterable[pyarrow.RecordBatch] = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            yield from (batch.slice(start, TABLE_ROWS) for start in range(0, batch.num_rows, TABLE_ROWS))
