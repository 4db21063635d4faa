"""Rows of a dataset -> JSONL, Parquet, and a folder that `datasets.load_from_disk` opens: streamed, whole or not there.

Every writer is given the same rows a batch at a time; nothing is held, so any number of rows can be written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet

COLUMNS = ("id", "instruction", "rejected", "chosen", "label", "provenance")
BATCH_ROWS = 4096
JSONL, PARQUET, ARROW = "si.jsonl", "si.parquet", "arrow"
FILES = {"all": (JSONL, PARQUET, ARROW), "jsonl": (JSONL,), "parquet": (PARQUET,)}
# `provenance` is a JSON string in the columnar files, so that its fields may differ between datasets.
SCHEMA = pyarrow.schema([(column, pyarrow.string()) for column in COLUMNS])
ARROW_FILE = "data-00000-of-00001.arrow"


class BatchWriter(Protocol):
    """Takes a batch of rows."""

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write them behind the ones before."""


class _Jsonl:
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class _Table:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        flat = [{**row, "provenance": json.dumps(row["provenance"], ensure_ascii=False)} for row in rows]
        self._writer.write_table(pyarrow.Table.from_pylist(flat, schema=SCHEMA))


@contextmanager
def _open_jsonl(path: Path) -> Iterator[BatchWriter]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        yield _Jsonl(file)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _open_parquet(path: Path) -> Iterator[BatchWriter]:
    with pyarrow.parquet.ParquetWriter(path, SCHEMA) as writer:
        yield _Table(writer)


@contextmanager
def _open_arrow(folder: Path) -> Iterator[BatchWriter]:
    """The layout of `Dataset.save_to_disk`, without the library: an arrow stream and two small JSON files."""
    folder.mkdir()
    with pyarrow.OSFile(str(folder / ARROW_FILE), "wb") as file, pyarrow.ipc.new_stream(file, SCHEMA) as writer:
        yield _Table(writer)
    with (folder / ARROW_FILE).open("rb") as file:
        fingerprint = hashlib.file_digest(file, "blake2b").hexdigest()[:16]
    features = {column: {"dtype": "string", "_type": "Value"} for column in COLUMNS}
    state: dict[str, Any] = {
        "_data_files": [{"filename": ARROW_FILE}],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    for name, content in (("dataset_info.json", {"features": features}), ("state.json", state)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_OPENERS = {JSONL: _open_jsonl, PARQUET: _open_parquet, ARROW: _open_arrow}


def write_dataset(output: Path, format: str, rows: Iterable[dict[str, Any]]) -> int:
    """Write `rows` into a dataset folder; returns how many there were.

    Files of an earlier merge are replaced when the new ones are complete; those of other formats go, because a reader
    of the folder must not find an older dataset.

    Args:
        output: The folder.
        format: Key of FILES.
        rows: With COLUMNS as keys, in this order; `provenance` is a dictionary.
    """
    output.mkdir(parents=True, exist_ok=True)
    partial = {name: output / f".{name}.partial" for name in FILES[format]}
    for path in partial.values():
        _remove(path)
    num_rows, stream = 0, iter(rows)
    with ExitStack() as stack:
        writers = [stack.enter_context(_OPENERS[name](path)) for name, path in partial.items()]
        while batch := list(islice(stream, BATCH_ROWS)):
            num_rows += len(batch)
            for writer in writers:
                writer.write(batch)
    for name in _OPENERS:
        if name not in partial or (output / name).is_dir():
            _remove(output / name)
    for name, path in partial.items():
        os.replace(path, output / name)
    return num_rows


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
