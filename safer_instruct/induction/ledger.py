"""Append-only JSONL ledgers: a stage's results survive its process and are never recomputed.

A ledger is one file with one writer. Its first line is a header (format version and the configuration that its records
were made with); every other line is a record with an `id`. A record counts once its newline is in the file; a partial
line left by a kill is dropped on the next start. It uses plain appends and fsync instead of a database, so that it also
works on network file systems.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from config.errors import UserError
from safer_instruct.experts.abstentions import NOT_ANSWERED
from safer_instruct.text.examples import Example

FORMAT = 1
WRITTEN_AT = "at"  # seconds since the epoch on each line, for `stage=status`; no part of the record
SYNC_SECONDS = 1.0  # an fsync at most this often, and at the end of every batch
_NUMBER, _PERHAPS_TEXT = int | float, str | None
_WRITTEN = {"reason": str, "tokens": int}
# What the records of a ledger hold, by the first word of its name; a hand or a disk may have changed it.
_HELD: dict[str, dict[str, Any]] = {
    "induce": {"response": str, "instruction": str, "truncated": bool, "prompt_cut": bool, "tokens": int},
    "score": {"best": int, "scores": list, "tokens": int},
    "filter": {"keep": bool, "label": str, **_WRITTEN},
    "respond": {"chosen": _PERHAPS_TEXT, **_WRITTEN},
    "vary": {"chosen": _PERHAPS_TEXT, **_WRITTEN},
    "replay": {"answer": str, "truncated": bool, "tokens": int},
    "contrast_neighbour": {"neighbour": _PERHAPS_TEXT, **_WRITTEN},
    "contrast_screen": _WRITTEN,
    "contrast_answer": {"answer": _PERHAPS_TEXT, **_WRITTEN},
    "generate": {"text": str, "truncated": bool, "prompt_cut": bool},
    "judge": {"outcome": str},
    "compare": {"winner": str},
}
_MAY_HOLD = {"at": _NUMBER, "candidates": list, "cost": _NUMBER, "error": str, "tokens": int}

Record = dict[str, Any]


class Ledger:
    """The records of one stage and shard, by id.

    Use it as a context manager, as it holds a lock on the file. `records` is read once on opening and kept up to date.
    """

    def __init__(self, path: Path, configuration: Mapping[str, Any], *, num_rows: int | None = None) -> None:
        """Open a ledger for appending, or start a new one.

        Args:
            path: The file; its folder is created.
            configuration: What the records depend on, as flat JSON values. Records made with different configurations
                are never mixed.
            num_rows: Number of rows of the stage in this shard; `stage=status` reads it from a new ledger's header.

        Raises:
            UserError: The ledger has another configuration, is in use by another process, or is corrupt before its end.
        """
        self.path = path
        self.records: dict[str, Record] = {}  # id -> record, in the order of the file
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._synced_at = time.monotonic()
        try:
            self._lock()
            header, self.records, end = _read(path)
            if header is None:
                os.ftruncate(self._file, 0)
                rows = {} if num_rows is None else {"rows": num_rows}
                self._write([{"format": FORMAT, "configuration": dict(configuration), **rows}])
                self.sync()
            else:
                check_configuration(path, header, configuration)
                os.ftruncate(self._file, end)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        os.close(self._file)

    def holds(self, id: str) -> bool:
        """Return whether a row has a final record."""
        return id in self.records and is_final(self.records[id])

    def append(self, record: Record) -> None:
        """Add one record with a new `id`. It survives a crash of the process; after `sync`, also one of the machine.

        Raises:
            ValueError: The ledger already has a final record with this id.
        """
        if self.holds(record["id"]):
            raise ValueError(f"{self.path}: row {record['id']} is in the ledger already")
        self._write([{**record, WRITTEN_AT: round(time.time(), 1)}])
        self.records[record["id"]] = record
        if time.monotonic() - self._synced_at > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Return once everything appended so far is on disk."""
        os.fsync(self._file)
        self._synced_at = time.monotonic()

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        # A lone surrogate, which a server may send, is written as its escape, which JSON reads back unchanged.
        data = memoryview(text.encode(errors="backslashreplace"))
        while data:  # a full disk or a signal can make a write short
            data = data[os.write(self._file, data) :]

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another process is writing this ledger; wait for it, or give each process of an array "
                "its own shard (shard.index=I shard.count=N)"
            ) from None
        except OSError:
            pass  # a file system without locks: here the user must ensure that each shard has one writer


def is_final(record: Mapping[str, Any]) -> bool:
    """Return whether a row is not asked again: what a server refused may be answered tomorrow, or by another one."""
    reasons = (str(record.get(key) or "").removeprefix("abstain_") for key in ("reason", "error"))
    return not any(reason.startswith(NOT_ANSWERED) for reason in reasons)


def settle(records: dict[str, Record], record: Record) -> None:
    """Keep of several records of a row the first that is final, or else the last."""
    if record["id"] not in records or not is_final(records[record["id"]]):
        records[record["id"]] = record


def read_ledger(path: Path, configuration: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Record]]:
    """Read a ledger without changing it: its configuration, and its records by id.

    Raises:
        UserError: There is no such ledger, its inside is broken, or it was made with another `configuration`.
    """
    header, records, _ = _read(path) if path.is_file() else (None, {}, 0)
    if header is None:
        raise UserError(f"{path}: no such ledger; run the stage that writes it first")
    if configuration is not None:
        check_configuration(path, header, configuration)
    return header["configuration"], records


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a ledger: its `configuration`, and usually `rows`, the stage's number of rows in this shard.

    Raises:
        UserError: There is no such ledger.
    """
    header = next(scan_ledger(path), None) if path.is_file() else None
    if header is None:
        raise UserError(f"{path}: no such ledger; run the stage that writes it first")
    return header[0]


def scan_records(path: Path) -> Iterator[tuple[Record, bytes]]:
    """Yield (record, line) of a ledger, one at a time, without its header; see scan_ledger."""
    lines = scan_ledger(path)
    next(lines, None)
    return lines


def run_stage(
    examples: Iterable[Example],
    ledger: Ledger,
    function: Callable[[Sequence[Example]], Iterable[Record]],
    *,
    batch_size: int,
    progress: Callable[[int], object] = lambda num_rows: None,
) -> None:
    """Compute the records of all examples that are missing from the ledger.

    `function` may yield the records in any order; `progress` is called with the number of rows just finished, or found
    in the ledger.
    """
    missing = _missing(examples, ledger, progress)
    for batch in iter(lambda: list(islice(missing, batch_size)), []):
        for record in function(batch):
            ledger.append(record)
            progress(1)
        ledger.sync()


def check_configuration(path: Path, header: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    """Raise a UserError that names the differing keys unless a ledger's header fits the configuration."""
    if header.get("format") != FORMAT:
        raise UserError(
            f"{path}: this ledger has format {header.get('format')}, but this version writes format {FORMAT}; "
            "give another output=FOLDER"
        )
    before: Mapping[str, Any] = header["configuration"]
    now = json.loads(json.dumps(configuration))
    differing = [
        f"{key} was {json.dumps(before.get(key))}, is now {json.dumps(now.get(key))}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise UserError(
            f"{path}: this ledger was made with another configuration: {'; '.join(differing)}. Give the old values to "
            "resume it, another output=FOLDER to start over, or delete the file (and those of the later stages) to "
            "recompute its rows"
        )


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[str, Record], int]:
    """Return (header or None, records by id, offset of the end of the last complete line)."""
    records: dict[str, Record] = {}
    header: dict[str, Any] | None = None
    end = 0
    for parsed, line in scan_ledger(path):
        end += len(line)
        if header is None:
            header = parsed
        else:
            parsed.pop(WRITTEN_AT, None)
            settle(records, parsed)
    return header, records, end


def scan_ledger(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield (object, line) for each complete line, one at a time: the header, then the records.

    Raises:
        UserError: The file is not a ledger, or is corrupt before its end; an incomplete last line is not an error.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            parsed = parse_line(line)
            if parsed is None:
                if file.read(1):  # more lines follow, so it is not an incomplete last line
                    raise UserError(
                        f"{path}:{number}: broken line inside the ledger; delete the line to compute its row again"
                    )
                return
            if number == 1 and not _is_header(parsed):
                raise UserError(f"{path}: not a ledger (its first line is no header); give another output=FOLDER")
            if number > 1 and not _is_record(parsed, path.name.partition("-")[0]):
                raise UserError(f"{path}:{number}: no record of this ledger; delete the line to compute its row again")
            yield parsed, line


def _is_record(parsed: Mapping[str, Any], kind: str) -> bool:
    held = {"id": str, **_HELD.get(kind, {})}
    optional = {name: what for name, what in _MAY_HOLD.items() if name in parsed}
    return all(isinstance(parsed.get(name, ...), what) for name, what in (held | optional).items())


def _is_header(parsed: Mapping[str, Any]) -> bool:
    is_ours = "format" in parsed and isinstance(parsed.get("configuration"), dict)
    return is_ours and isinstance(parsed.get("rows", 0), int)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the header or the record on a line, or None if the line is incomplete or holds neither."""
    if not line.endswith(b"\n"):
        return None
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, a number with too many digits, or too deeply nested
        return None
    return parsed if isinstance(parsed, dict) and (isinstance(parsed.get("id"), str) or _is_header(parsed)) else None


def _missing(examples: Iterable[Example], ledger: Ledger, progress: Callable[[int], object]) -> Iterator[Example]:
    for example in examples:
        if ledger.holds(example.id):
            progress(1)
        else:
            yield example


def shard_path(folder: Path, stage: str, index: int, count: int) -> Path:
    """Return the path of the ledger of one stage and shard: `induce-00002-of-00016.jsonl`."""
    return folder / f"{stage}-{index:05d}-of-{count:05d}.jsonl"


def shard_count(folder: Path) -> int | None:
    """Return the number of shards that the ledgers in a folder were made for; None if there are no ledgers.

    Raises:
        UserError: They were made for different numbers of shards.
    """
    names = [re.fullmatch(r"\w+-\d{5}-of-(\d{5})\.jsonl", path.name) for path in sorted(folder.glob("*.jsonl"))]
    counts = sorted({int(match.group(1)) for match in names if match})
    if len(counts) > 1:
        raise UserError(
            f"{folder}: this folder mixes ledgers for {' and '.join(map(str, counts))} shards; keep those for one "
            "number of shards, and move the others away"
        )
    return counts[0] if counts else None
