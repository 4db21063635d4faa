"""The working folder of a merge or an audit: tables as Parquet files, which DuckDB joins and sorts out of core.

Rows are streamed into and out of Parquet files. DuckDB reads only the narrow columns that a query names, and writes its
results into Parquet files again. Two simpler ways exceed its memory limit. Rows with their texts in DuckDB's own tables
took 426 MB for 300,000 rows under a limit of 256 MB. Joins and a sort of 10 million narrow rows in one statement ended
with "out of memory" under 192 MB; one statement for each takes 145 MB under 128 MB.
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow
import pyarrow.parquet
from filelock import FileLock, Timeout

from config.errors import UserError

BATCH_ROWS = 4096
THREADS = 2  # each needs about 64 MB of the memory below
# DuckDB's memory limit before it spills to disk, by `duplicates.index`.
MEMORY = {"memory": "1GB", "disk": "128MB"}
INT, LONG, FLOAT, TEXT = pyarrow.int32(), pyarrow.int64(), pyarrow.float64(), pyarrow.string()


def table_schema(**columns: pyarrow.DataType) -> pyarrow.Schema:
    """Return the schema of a table with these columns."""
    return pyarrow.schema(list(columns.items()))


class Scratch:
    """The tables of one merge or audit. SQL holds only our own table and column names; all values are bound."""

    def __init__(self, folder: Path, index: str) -> None:
        """Start without tables; `index` is a key of MEMORY."""
        self._folder = folder
        self._database = duckdb.connect(
            config={
                "memory_limit": MEMORY[index],
                "threads": THREADS,
                "temp_directory": str(folder / "spilled"),
                "preserve_insertion_order": False,  # tables that need an order are sorted explicitly
            }
        )

    def create(self, name: str, schema: pyarrow.Schema, rows: Iterable[Sequence[Any]]) -> None:
        """Create a table from rows."""
        self.create_from_batches(name, schema, record_batches(schema, rows))

    def create_from_batches(self, name: str, schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]) -> None:
        """Create a table from record batches."""
        # Dictionaries do not help when nearly all values differ, and they stay in memory until the file is closed.
        with pyarrow.parquet.ParquetWriter(self._path(name), schema, use_dictionary=False) as writer:
            for batch in batches:
                writer.write_batch(batch)
        self._add(name)

    def derive(self, name: str, sql: str, *values: Any, order: str | None = None) -> None:
        """Create a table from a query, which should hold only one join, grouping or window; see the module docstring.

        The query must have no ORDER BY; `order` names the columns to sort the new table by.
        """
        self._copy(name, sql, *values)
        if order is not None:
            self._copy(f"{name}_in_order", f"FROM {name} ORDER BY {order}")
            self._path(f"{name}_in_order").replace(self._path(name))

    def _copy(self, name: str, sql: str, *values: Any) -> None:
        path = str(self._path(name)).replace("'", "''")
        self._database.execute(f"COPY ({sql}) TO '{path}' (FORMAT parquet)", values)
        self._add(name)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.parquet"

    def _add(self, name: str) -> None:
        # DuckDB reads the path as a glob pattern, but a folder may be named `run[1]`.
        self._database.read_parquet(glob.escape(str(self._path(name)))).create_view(name)

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return all rows of a query, which must be few."""
        return self._database.execute(sql, values).fetchall()

    def batches(self, name: str, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
        """Yield some columns of a table as record batches, in row order."""
        with pyarrow.parquet.ParquetFile(self._path(name)) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=list(columns))

    def rows(self, name: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield the rows of `batches` as tuples."""
        for batch in self.batches(name, columns):
            yield from zip(*(batch.column(column).to_pylist() for column in columns), strict=True)

    def close(self) -> None:
        """Release DuckDB's memory and files."""
        self._database.close()


def record_batches(schema: pyarrow.Schema, rows: Iterable[Sequence[Any]]) -> Iterator[pyarrow.RecordBatch]:
    """Yield rows as record batches of BATCH_ROWS."""
    stream = iter(rows)
    while chunk := list(islice(stream, BATCH_ROWS)):
        columns = zip(*chunk, strict=True)
        arrays = [pyarrow.array(column, type) for column, type in zip(columns, schema.types, strict=True)]
        yield pyarrow.record_batch(arrays, schema)


@contextmanager
def open_scratch(folder: Path, index: str) -> Iterator[Scratch]:
    """Create the folder, after deleting what a killed process left there, and remove it at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    scratch = Scratch(folder, index)
    try:
        yield scratch
    finally:
        scratch.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def lock_output(output: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Lock a dataset folder for this process; the lock is reentrant.

    Raises:
        UserError: Another process is merging or auditing into it.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        raise UserError(
            f"output={output}: another stage=merge or stage=audit is writing into this folder; wait for it to "
            "end, or give another output=FOLDER"
        ) from None
    except (NotImplementedError, OSError):
        pass  # a file system without locks: the user must then avoid parallel merges, as with ledgers
    try:
        yield
    finally:
        lock.release()
