"""Write a dataset as JSONL, as Parquet, and as a folder for `datasets.load_from_disk`: streamed and atomic.

Every writer gets the same rows, one batch at a time. No batch is kept, so any number of rows can be written.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet

from config.checksums import CHECKSUMS, write_checksums
from config.files import replacing

COLUMNS = ("id", "instruction", "rejected", "chosen", "label", "provenance")
HISTORY = "history"  # only for conversations, after the id: the messages before the instruction, as JSON
JSONL, PARQUET, ARROW = "si.jsonl", "si.parquet", "arrow"
FILES = {"all": (JSONL, PARQUET, ARROW), "jsonl": (JSONL,), "parquet": (PARQUET,)}
# `provenance` is a JSON string in the columnar files, so that its fields may differ between datasets.
SCHEMA = pyarrow.schema([(column, pyarrow.string()) for column in COLUMNS])
HISTORY_SCHEMA = SCHEMA.insert(1, pyarrow.field(HISTORY, pyarrow.string()))

WriteBatch = Callable[[pyarrow.RecordBatch], object]


@contextmanager
def _open_jsonl(path: Path, schema: pyarrow.Schema) -> Iterator[WriteBatch]:
    with replacing(path, durable=True) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:

        def write(batch: pyarrow.RecordBatch) -> None:
            for row in batch.to_pylist():
                provenance = row.pop("provenance")  # the last column, and already JSON
                if HISTORY in row:
                    row[HISTORY] = json.loads(row[HISTORY] or "[]")
                file.write(f'{json.dumps(row, ensure_ascii=False)[:-1]}, "provenance": {provenance}}}\n')

        yield write


@contextmanager
def _open_parquet(path: Path, schema: pyarrow.Schema) -> Iterator[WriteBatch]:
    with replacing(path, durable=True) as partial, pyarrow.parquet.ParquetWriter(partial, schema) as writer:
        yield writer.write_batch


@contextmanager
def _open_arrow(folder: Path, schema: pyarrow.Schema) -> Iterator[WriteBatch]:
    """Let `datasets` save an empty dataset, then stream the rows into its data file.

    Saving the rows themselves with `save_to_disk` would map the whole file that it copies into resident memory.
    """
    import datasets  # here, because it is slow to import and the other formats do not need it

    datasets.disable_progress_bars()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left over from a killed process
    try:
        # `datasets` caches what it computes from a dataset under its fingerprint, so each needs its own.
        empty = datasets.Dataset(datasets.table.InMemoryTable(schema.empty_table()), fingerprint=uuid.uuid4().hex[:16])
        empty.save_to_disk(partial, num_shards=1)
        (data_file,) = partial.glob("*.arrow")
        with pyarrow.OSFile(str(data_file), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
            yield writer.write_batch
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


_OPENERS: dict[str, Callable[[Path, pyarrow.Schema], AbstractContextManager[WriteBatch]]] = {
    JSONL: _open_jsonl,
    PARQUET: _open_parquet,
    ARROW: _open_arrow,
}


def write_dataset(
    output: Path, format: str, batches: Iterable[pyarrow.RecordBatch], schema: pyarrow.Schema = SCHEMA
) -> int:
    """Write a dataset folder, and return the number of rows.

    Files of an earlier merge are replaced once the new ones are complete. Earlier files in other formats are deleted,
    so that a reader of the folder cannot find an older dataset.

    The batches have `schema` (SCHEMA, or HISTORY_SCHEMA for conversations), with a JSON object as `provenance`.
    `format` is a key of FILES.
    """
    output.mkdir(parents=True, exist_ok=True)
    num_rows = 0
    with ExitStack() as stack:
        writers = [stack.enter_context(_OPENERS[name](output / name, schema)) for name in FILES[format]]
        for batch in batches:
            num_rows += batch.num_rows
            for write in writers:
                write(batch)
        (output / CHECKSUMS).unlink(missing_ok=True)  # those of an earlier merge would not match the new files
        for name in _OPENERS.keys() - set(FILES[format]):
            shutil.rmtree(output / name, ignore_errors=True)
            (output / name).unlink(missing_ok=True)
    parts = [output / name for name in FILES[format]]
    write_checksums(output, owner="dataset", files=[file for part in parts for file in (part, *part.rglob("*"))])
    return num_rows
