"""One reader per data file format, compressed or not: it yields the rows, with the line that each starts on."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import pyarrow
import pyarrow.parquet

from config.errors import UserError
from safer_instruct.text.arrow_sizes import largest_unpacked
from safer_instruct.text.display import short_name

Row = dict[str, Any]

MAX_TEXT_CHARACTERS = 1 << 24  # anything longer is an unclosed quote or a damaged file, not a text
MAX_LINE_CHARACTERS = 2 * MAX_TEXT_CHARACTERS  # limit of a JSON line, where a row may hold several texts
JSON_CHUNK_CHARACTERS = 1 << 20
MAX_GROUP_BYTES = 2 << 30  # limit of an unpacked Parquet row group or arrow record batch, which is held in memory
GROUP_ROWS = 256  # rows converted at a time; fewer where a dictionary could make each of them large
DICTIONARY_PAGE = 2  # Parquet's number for this type of page
MAX_TABLE_EXPANSION = 1000  # ratio of text to bytes on disk: a dictionary may repeat one text in every row
MIN_TABLE_CHARACTERS = 1 << 30  # up to this much text, the ratio is not checked

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TEXT_SUFFIXES = (".csv", ".json", ".jsonl")
DATA_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow", *(text + end for text in TEXT_SUFFIXES for end in COMPRESSIONS))


def data_suffix(file: Path) -> str:
    """Return the suffix that names a file's format, in lower case: ".csv", ".jsonl.gz"; "" if it is no data file."""
    name = file.name.lower()
    return max((suffix for suffix in DATA_SUFFIXES if name.endswith(suffix)), key=len, default="")


class BadLine(UserError):
    """One row that cannot be read, in a file whose later rows can be.

    Attributes:
        where: file:line.
        reason: The name under which it is counted.
    """

    def __init__(self, where: str, reason: str, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self.where, self.reason = where, reason


def refuse(line: BadLine) -> None:
    """Raise the error of a row that cannot be read."""
    raise line


def read_file(file: Path) -> Iterator[tuple[str, Row | BadLine]]:
    """Yield ("file:line", row) of a data file; see `readers.read_rows`."""
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Row | BadLine]]]] = {
        ".csv": _read_csv, ".json": _read_json, ".jsonl": _read_json, ".parquet": _read_table, ".arrow": _read_table,
    }  # fmt: skip
    found = False
    suffix = data_suffix(file)
    packed = Path(suffix).suffix in COMPRESSIONS
    try:
        for number, row in readers[suffix.rpartition(".")[0] if packed else suffix](file):
            found = True
            yield f"{file}:{number}", row
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{_first_bad_line(file)}: bytes that are not UTF-8; convert the file to UTF-8") from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise UserError(f"{file}: not a readable {suffix[1:]} file{reason}") from error
    except (ValueError, LookupError, ArithmeticError) as error:  # a date beyond the year 9999, an unknown time zone
        raise UserError(f"{file}: a value that Python cannot hold ({error}); leave out its column") from error
    if not found:
        raise UserError(f"{file}: the file is empty; it must hold at least one row")


def _open_bytes(file: Path) -> BinaryIO:
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        return file.open("rb")
    # pyarrow has both codecs; its stream behaves like a raw file, although it is not typed as one.
    return io.BufferedReader(cast(io.RawIOBase, pyarrow.input_stream(str(file), compression=compression)))


def _open_text(file: Path, newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(_open_bytes(file), encoding="utf-8-sig", newline=newline)


def _first_bad_line(file: Path) -> str:
    """Return the location of the first line that is not UTF-8: a decoder reads ahead, so its position is no help."""
    with _open_bytes(file) as lines:
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
    with _open_text(file, newline="") as lines:
        # A blank before a quote would make the quotes a part of the text.
        reader = csv.reader(_without_nul(lines, file), strict=True, skipinitialspace=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            _require_distinct(header, file)
            line = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(header):
                    fields = f"{len(values)} fields where the header has {len(header)}"
                    why = f"{fields}; quote every field that holds a comma, a quote or a line break"
                    yield line, BadLine(f"{file}:{line}", "wrong_number_of_fields", why)
                elif values:
                    yield line, dict(zip(header, values, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{file}:{line}: broken CSV quoting in the record that starts here ({error}); write a quote inside "
                'a quoted field as ""'
            ) from error


def _require_distinct(names: Sequence[str], where: object) -> None:
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: two columns are called {short_name(twice)}; rename or remove one of them")


def _without_nul(lines: Iterable[str], file: Path) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise UserError(f"{file}:{number}: a NUL character; the file is damaged, or is UTF-16: convert it to UTF-8")
        yield line


def _read_jsonl(file: Path) -> Iterator[tuple[int, Row | BadLine]]:
    with _open_text(file) as lines:
        # readline with a limit, so that a file without line breaks is not read into memory as a whole.
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_CHARACTERS), ""), start=1):
            if len(line) == MAX_LINE_CHARACTERS:
                raise UserError(f"{file}:{number}: a line of more than {len(line):,} characters")
            if line.strip():
                row = _json_row(line, f"{file}:{number}")
                if isinstance(row, BadLine) and not line.endswith("\n"):
                    raise UserError(str(row))  # the file is truncated here, so more rows than this one are missing
                yield number, row


_TOO_MUCH_JSON = "JSON that is nested too deeply, a number of too many digits, or a key that stands twice in an object"


def _distinct(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):  # by itself `json` takes the last one
        raise ValueError("a key that stands twice")
    return row


_JSON = json.JSONDecoder(object_pairs_hook=_distinct)


def _json_row(line: str, where: str) -> Row | BadLine:
    try:
        row = _JSON.decode(line)
    except json.JSONDecodeError as error:
        message = (
            f"broken JSON: {error.msg} at column {error.colno}; a file holds one object a line, or one list of objects"
        )
        return BadLine(where, "broken_json", message)
    except (ValueError, RecursionError):
        return BadLine(where, "broken_json", _TOO_MUCH_JSON)
    return _object(row, where)


def _object(row: object, where: str) -> Row | BadLine:
    if isinstance(row, dict):
        return row
    message = f"a row must be a JSON object with named fields, not a {type(row).__name__}"
    return BadLine(where, "not_an_object", message)


def _read_json(file: Path) -> Iterator[tuple[int, Row | BadLine]]:
    """Yield the objects of a JSON list, parsed one at a time; a file that does not start with "[" has one a line.

    Why not `ijson`: its C parser silently turns a lone surrogate into "?" (here such a row is counted), rejects NaN,
    which json writes, reports no line numbers, crashed on an integer of 5,000 digits, and needed 8 GB for 200 kB of
    brackets.
    """
    with _open_text(file) as source:
        text = source.read(JSON_CHUNK_CHARACTERS)
        position = _next_item(text, 0)
        if text[position : position + 1] != "[":
            yield from _read_jsonl(file)
            return
        line, position = 1 + text.count("\n", 0, position), position + 1
        while True:
            start = _next_item(text, position)
            if text[start : start + 1] == "]":
                _require_end(text[start + 1 :], source, f"{file}:{line + text.count(chr(10), position, start)}")
                return
            try:
                row, end = _JSON.raw_decode(text, start)
            except json.JSONDecodeError as error:
                chunk = source.read(JSON_CHUNK_CHARACTERS)
                if not chunk or len(text) - position > MAX_LINE_CHARACTERS:
                    broken = line + text.count("\n", position, error.pos)
                    raise UserError(f"{file}:{broken}: broken JSON: {error.msg}") from error
                if start == len(text):  # only whitespace and perhaps a comma; drop it, there may be gigabytes of it
                    line += text.count("\n", position)
                    text, position = text[position:].strip() + chunk, 0
                else:
                    text, position = text[position:] + chunk, 0  # the item may continue in the next chunk
                continue
            except (ValueError, RecursionError) as error:
                line += text.count("\n", position, start)
                raise UserError(f"{file}:{line}: {_TOO_MUCH_JSON}") from error
            line += text.count("\n", position, start)
            yield line, _object(row, f"{file}:{line}")
            line, position = line + text.count("\n", start, end), end


def _require_end(rest: str, source: TextIO, where: str) -> None:
    while rest:
        if rest.strip():
            raise UserError(f"{where}: the list of rows ends here, but the file does not; write all rows into one list")
        rest = source.read(JSON_CHUNK_CHARACTERS)


def _next_item(text: str, position: int) -> int:
    """Return where the next item of a list begins: after whitespace and at most one comma."""
    return _BEFORE_ITEM.match(text, position).end()  # type: ignore[union-attr]  # it always matches


_BEFORE_ITEM = re.compile(r"[ \n\r\t]*,?[ \n\r\t]*")


def _read_table(file: Path) -> Iterator[tuple[int, Row]]:
    characters, limit = 0, max(MIN_TABLE_CHARACTERS, MAX_TABLE_EXPANSION * file.stat().st_size)
    rows = chain.from_iterable(_rows_of(batch, file) for batch in _batches(file))
    for number, row in enumerate(rows, start=1):
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if characters > limit:
            raise UserError(
                f"{file}:{number}: the texts up to here are more than {limit / 2**30:.1f} GiB, over "
                f"{MAX_TABLE_EXPANSION:,} times the file: one text repeats in row after row; leave out its column, or "
                "write the file as JSONL if this is intended"
            )
        yield number, row


def _rows_of(batch: pyarrow.RecordBatch, file: Path) -> list[Row]:
    _require_distinct(batch.schema.names, file)
    rows: list[Row] = batch.to_pylist()
    return rows


def _batches(file: Path) -> Iterator[pyarrow.RecordBatch]:
    """Yield the batches of a Parquet file or an arrow file (the stream format that `datasets` writes, or Feather)."""
    if file.suffix.lower() == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as table:
            groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
            largest = max((group.total_byte_size for group in groups), default=0)
            _require_room(file, "row group", largest, "row_group_size=10000")
            for number, group in enumerate(groups):
                with file.open("rb") as raw:
                    repeated = max((_repeated_bytes(raw, group.column(i)) for i in range(group.num_columns)), default=0)
                yield from table.iter_batches(batch_size=_rows_at_a_time(repeated), row_groups=[number])
        return
    with pyarrow.memory_map(str(file)) as source:
        _require_room(file, "record batch", largest_unpacked(source), "max_chunksize=10000")
        source.seek(0)
        try:
            batches: Iterable[pyarrow.RecordBatch] = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            _require_room(file, "record batch", batch.nbytes, "max_chunksize=10000")
            step = _rows_at_a_time(max((column.nbytes for column in batch.columns if _repeats(column.type)), default=0))
            yield from (batch.slice(start, step) for start in range(0, batch.num_rows, step))


def _repeated_bytes(file: BinaryIO, column: pyarrow.parquet.ColumnChunkMetaData) -> int:
    """Return the unpacked size of what a column stores once but may repeat in every row, in bytes."""
    starts = (column.dictionary_page_offset, column.data_page_offset)
    file.seek(min((start for start in starts if start), default=0))
    # A page header begins with page type, unpacked size and packed size: each is 0x15 and a zigzag-encoded number.
    header, numbers = file.read(24), list[int]()
    while len(numbers) < 3 and (found := re.match(rb"\x15([\x80-\xff]*[\x00-\x7f])", header)):
        numbers.append(sum((byte & 127) << 7 * place for place, byte in enumerate(found[1])) // 2)
        header = header[found.end() :]
    if len(numbers) < 3 or "DELTA_BYTE_ARRAY" in column.encodings:  # values share prefixes with the one before
        return int(column.total_uncompressed_size)
    return max(numbers[1:]) if numbers[0] == DICTIONARY_PAGE else 0


def _repeats(type: pyarrow.DataType) -> bool:
    """Return whether arrow may store a value of this type once for several rows."""
    kinds = pyarrow.types
    views = (kinds.is_string_view, kinds.is_binary_view, kinds.is_list_view, kinds.is_large_list_view)
    if any(is_kind(type) for is_kind in (kinds.is_dictionary, kinds.is_run_end_encoded, *views)):
        return True
    return any(_repeats(type.field(i).type) for i in range(type.num_fields))


def _require_room(file: Path, what: str, num_bytes: int, how: str) -> None:
    if num_bytes > MAX_GROUP_BYTES:
        raise UserError(
            f"{file}: a {what} of {num_bytes / 2**30:.1f} GiB, which is read as a whole; write the file with smaller "
            f"ones ({how})"
        )


def _rows_at_a_time(repeated_bytes: int) -> int:
    """Return how many rows (at most GROUP_ROWS) fit into MAX_GROUP_BYTES if each repeats this many bytes."""
    return max(1, min(GROUP_ROWS, MAX_GROUP_BYTES // max(1, repeated_bytes)))
