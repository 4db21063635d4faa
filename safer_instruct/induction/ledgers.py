"""The ledgers of all shards of a stage, as one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import UserError
from safer_instruct.induction.ledger import Record, read_header, scan_records, shard_count, shard_path
from safer_instruct.induction.stages import (
    REQUIRED_STAGES,
    SCORE,
    STAGES,
)


@dataclass(frozen=True)
class StageLedgers:
    """The ledgers of one stage from all shards, and the configuration that all of them were made with."""

    configuration: dict[str, Any]
    paths: tuple[Path, ...]

    def records(self) -> Iterator[tuple[Record, bytes]]:
        """Yield (record, line) of all of them."""
        for path in self.paths:
            yield from scan_records(path)


def find_ledgers(folder: Path) -> dict[str, StageLedgers]:
    """Return the ledgers of all stages and shards; only their headers are read.

    Raises:
        UserError: A ledger is missing, or the shards of a stage were made with different configurations.
    """
    count = shard_count(folder)
    if count is None:
        raise UserError(f"{folder}: no ledgers to merge; run stage=induce, filter and respond first, or stage=all")
    scored = any(folder.glob(f"{SCORE}-*.jsonl"))
    return {stage: stage_ledgers(folder, stage, count) for stage in STAGES if scored or stage in REQUIRED_STAGES}


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
