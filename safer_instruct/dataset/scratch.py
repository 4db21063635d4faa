"""The folder in which a merge or an audit works: tables as Parquet files, which DuckDB joins and sorts out of core.

Rows are streamed into Parquet files and out of them; DuckDB reads of them only the narrow columns that a query names,
and writes what it finds into Parquet files again. Two other ways do not keep to its memory limit: rows in its own
tables, texts included, took 426 MB for 300,000 rows under a limit of 256 MB; and joins and a sort of 10 million narrow
rows in one statement ended with "out of memory" under 192 MB, where a statement for each takes 145 MB under 128 MB.
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
THREADS = 2  # each needs about 64 MB of what follows
# What DuckDB may hold before it spills to the disk, by `duplicates.index`.
MEMORY = {"memory": "1GB", "disk": "128MB"}
INT, LONG, FLOAT, TEXT = pyarrow.int32(), pyarrow.int64(), pyarrow.float64(), pyarrow.string()


def table_schema(**columns: pyarrow.DataType) -> pyarrow.Schema:
    """Return the schema of a table with these columns."""
    return pyarrow.schema(list(columns.items()))


class Scratch:
    """Tables of one merge or audit. Names of tables and columns in SQL are ours; values are bound, never written in."""

    def __init__(self, folder: Path, index: str) -> None:
        """Start without tables; `index` is a key of MEMORY."""
        self._folder = folder
        self._database = duckdb.connect(
            config={
                "memory_limit": MEMORY[index],
                "threads": THREADS,
                "temp_directory": str(folder / "spilled"),
                "preserve_insertion_order": False,  # what needs an order is sorted
            }
        )

    def create(self, name: str, schema: pyarrow.Schema, rows: Iterable[Sequence[Any]]) -> None:
        """Create a table from rows."""
        self.create_from_batches(name, schema, record_batches(schema, rows))

    def create_from_batches(self, name: str, schema: pyarrow.Schema, batches: Iterable[pyarrow.RecordBatch]) -> None:
        """Create a table from record batches."""
        # Dictionaries gain nothing where nearly every value is another, and they are held until a file is closed.
        with pyarrow.parquet.ParquetWriter(self._path(name), schema, use_dictionary=False) as writer:
            for batch in batches:
                writer.write_batch(batch)
        self._add(name)

    def derive(self, name: str, sql: str, *values: Any, order: str | None = None) -> None:
        """Create a table from a query, which should hold one join, one grouping or one window; see the module.

        The query has no ORDER BY: `order` names the columns by which the rows of the new table are sorted.
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
        # The path is a pattern to DuckDB: a folder may be named `run[1]`.
        self._database.read_parquet(glob.escape(str(self._path(name)))).create_view(name)

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query; there must be few."""
        return self._database.execute(sql, values).fetchall()

    def batches(self, name: str, columns: Sequence[str]) -> Iterator[pyarrow.RecordBatch]:
        """Yield columns of a table in the order of its rows."""
        with pyarrow.parquet.ParquetFile(self._path(name)) as file:
            yield from file.iter_batches(BATCH_ROWS, columns=list(columns))

    def rows(self, name: str, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """Yield what `batches` does, row by row."""
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
    """Make the folder, and remove it at the end; what a killed process left in it goes first."""
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
    """Hold a dataset folder for this process; who holds it already may take it again.

    Raises:
        UserError: Another process merges or audits into it.
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
        pass  # a file system without locks: one merge at a time is then the user's to see to, as with ledgers
    try:
        yield
    finally:
        lock.release()
