"""The ledgers of all shards of a stage, as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from config.errors import UserError
from safer_instruct.induction.ledger import Record, read_header, scan_ledger, shard_count, shard_path
from safer_instruct.induction.stages import REQUIRED_STAGES, SCORE, STAGES, stage_digest

_OFFSET_BITS = 40  # of a place: its ledger's number stands above them


@dataclass(frozen=True)
class StageLedgers:
    """The ledgers of one stage from all shards, and the configuration that all of them were made with."""

    configuration: dict[str, Any]
    paths: tuple[Path, ...]

    def records(self) -> Iterator[tuple[Record, int]]:
        """Yield (record, place) of all of them; `lines` reads the places again."""
        for number, path in enumerate(self.paths):
            end = 0
            for record, line in scan_ledger(path):
                if end:  # the first line is the header
                    yield record, number << _OFFSET_BITS | end
                end += len(line)

    def lines(self, places: Sequence[int | None]) -> list[bytes | None]:
        """Return the record's line at each place.

        Each ledger is opened once and read forwards: with a thousand shards, open files would be more than a process
        may have, and single reads in the order of the corpus more than a network file system bears.
        """
        found: dict[int | None, bytes] = {}
        known = sorted(place for place in places if place is not None)
        for number, of_ledger in groupby(known, key=lambda place: place >> _OFFSET_BITS):
            with self.paths[number].open("rb") as file:
                for place in of_ledger:
                    file.seek(place & ((1 << _OFFSET_BITS) - 1))
                    found[place] = file.readline()
        return [found.get(place) for place in places]


def find_ledgers(folder: Path) -> dict[str, StageLedgers]:
    """Return the ledgers of all stages and shards; only their headers are read.

    Raises:
        UserError: A ledger is missing, the shards of a stage were made with different configurations, or a stage was
            made from another run of the stage before than the one that is there.
    """
    count = shard_count(folder)
    if count is None:
        raise UserError(f"{folder}: no ledgers to merge; run stage=induce, filter and respond first, or stage=all")
    scored = any(folder.glob(f"{SCORE}-*.jsonl"))
    found = {stage: stage_ledgers(folder, stage, count) for stage in STAGES if scored or stage in REQUIRED_STAGES}
    check_chain(folder, found)
    return found


def check_chain(folder: Path, found: dict[str, StageLedgers]) -> None:
    """Raise a UserError that names the first stage whose records are not about what the stage before holds."""
    stages = list(found)
    for before, stage in pairwise(stages):
        if found[stage].configuration.get("stage_before") != stage_digest(found[before].configuration):
            later = ", ".join(f"{name}-*" for name in stages[stages.index(stage) :])
            raise UserError(
                f"{folder}: the ledgers of stage={stage} were made from other ledgers of stage={before} than those "
                f"that are there now, so their records do not belong together. Delete {later} and run these stages "
                f"again, or put the old {before}-* back"
            )


def stage_ledgers(folder: Path, stage: str, count: int) -> StageLedgers:
    """Return the ledgers of one stage; see find_ledgers."""
    paths = tuple(shard_path(folder, stage, index, count) for index in range(count))
    missing = [str(index) for index, path in enumerate(paths) if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {count} shards have no ledger of stage={stage} (first missing: "
            f"{', '.join(missing[:10])}); run them, each with shard.index=I shard.count={count}, before the next step"
        )
    first = read_header(paths[0])
    for path in paths[1:]:
        configuration = read_header(path)
        if configuration != first:
            keys = sorted({*configuration, *first})
            differing = [key for key in keys if configuration.get(key) != first.get(key)]
            raise UserError(
                f"{path}: made with another configuration than shard 0 ({', '.join(differing)}); delete the ledgers of "
                "the wrong shards and run these again"
            )
    return StageLedgers(first, paths)
