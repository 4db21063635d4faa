"""The ledgers of all shards of a stage, read as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.names import BENIGN_STAGES
from safer_instruct.induction.ledger import (
    Record,
    read_header,
    scan_ledger,
    scan_records,
    settle,
    shard_count,
    shard_path,
)
from safer_instruct.induction.stages import FILTER, INDUCE, OPTIONAL_STAGES, RESPOND, SCORE, STAGES, stage_digest

_OFFSET_BITS = 40  # low bits of a place, for the offset in the file; the ledger's number is in the bits above


@dataclass(frozen=True)
class StageLedgers:
    """The ledgers of one stage from all shards, and their common configuration."""

    configuration: dict[str, Any]
    paths: tuple[Path, ...]

    def records(self) -> Iterator[tuple[Record, int]]:
        """Yield (record, place) from all ledgers; `lines` takes such places."""
        for number, path in enumerate(self.paths):
            end = 0
            for record, line in scan_ledger(path):
                if end:  # the first line is the header
                    yield record, number << _OFFSET_BITS | end
                end += len(line)

    def by_id(self) -> dict[str, Record]:
        """Return the record of each row that has one."""
        found: dict[str, Record] = {}
        for record, _ in self.records():
            settle(found, record)
        return found

    def num_missing(self) -> int:
        """Return how many rows of their shards have no record."""
        rows = (
            read_header(path).get("rows", 0) - len({one["id"] for one, _ in scan_records(path)}) for path in self.paths
        )
        return sum(max(0, number) for number in rows)

    def lines(self, places: Sequence[int | None]) -> list[bytes | None]:
        """Return the record's line at each place.

        Each ledger is opened once and read forwards. With a thousand shards, keeping all of them open would exceed the
        limit on open files, and reading in corpus order would overload a network file system.
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
        UserError: A ledger is missing, the shards of a stage have different configurations, or the ledgers of a stage
            were made from other ledgers of the stage before than those present.
    """
    count = shard_count(folder)
    if count is None:
        raise UserError(f"{folder}: no ledgers to merge; run stage=induce, filter and respond first, or stage=all")
    found = {stage: stage_ledgers(folder, stage, count) for stage in present_stages(folder)}
    check_chain(folder, found)
    return found


def present_stages(folder: Path) -> list[str]:
    """Return the stages of an induction; optional ones only if they have a ledger."""
    return [stage for stage in STAGES if stage not in OPTIONAL_STAGES or any(folder.glob(f"{stage}-*.jsonl"))]


def check_chain(folder: Path, found: dict[str, StageLedgers]) -> None:
    """Raise a UserError that names the first stage whose records were not made from the present stage before it."""
    stages = list(found)
    for before, stage in pairwise(stages):
        if found[stage].configuration.get("stage_before") != stage_digest(found[before].configuration):
            later = ", ".join(f"{name}-*" for name in stages[stages.index(stage) :])
            raise UserError(
                f"{folder}: the ledgers of stage={stage} were made from other ledgers of stage={before} than those "
                f"that are there now, so their records do not belong together. Delete {later} and rerun these stages, "
                f"or restore the old {before}-*"
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
    first = read_header(paths[0])["configuration"]
    for path in paths[1:]:
        configuration = read_header(path)["configuration"]
        if configuration != first:
            keys = sorted({*configuration, *first})
            differing = [key for key in keys if configuration.get(key) != first.get(key)]
            raise UserError(
                f"{path}: made with another configuration than shard 0 ({', '.join(differing)}); delete the ledgers of "
                "the wrong shards and rerun these"
            )
    return StageLedgers(first, paths)


def require_same_shards(ledgers: Path, count: int) -> None:
    """Refuse to mix shards of different sizes in one output: some rows would be computed, and paid for, again."""
    before = shard_count(ledgers)
    if before not in (None, count):
        raise UserError(
            f"{ledgers} holds ledgers for {before} shards, and this command works on shard.count={count}: give "
            f"shard.count={before} (and shard.index), or another output=FOLDER"
        )


def require_own_folder(ledgers: Path, stage: str) -> None:
    """Refuse an output folder with ledgers of other stages, because it would then hold two datasets."""
    foreign = [path.name for path in ledgers.glob("*.jsonl") if path.name.partition("-")[0] not in BENIGN_STAGES[stage]]
    if foreign:
        raise UserError(
            f"{ledgers} holds {min(foreign)} of another stage, but stage={stage} makes a separate dataset; give "
            "another output=FOLDER"
        )


def provenance_of_all(ledgers: Mapping[str, StageLedgers]) -> dict[str, Any]:
    """Return the provenance shared by all rows of the merged dataset: models, decoding settings, prompts."""
    induced, screened = ledgers[INDUCE].configuration, ledgers[FILTER].configuration
    shared = {
        "reversed_model": induced["model"],
        "reversed_model_fingerprint": induced["model_fingerprint"],
        "reversed_prompt": induced["prompt"],
        **{name: induced[f"generation.{name}"] for name in ("temperature", "top_p", "max_new_tokens", "seed")},
        "num_candidates": induced.get("generation.num_candidates", 1),
    }
    for stage in (FILTER, RESPOND):
        expert = ledgers[stage].configuration
        shared[f"{stage}_expert"] = expert["expert"]
        shared[f"{stage}_expert_fingerprint"] = expert["expert_fingerprint"]
        shared[f"{stage}_prompt"] = expert["expert_prompt"]
    if SCORE in ledgers:
        scored = ledgers[SCORE].configuration
        shared |= {name: scored[name] for name in ("forward_model", "forward_fingerprint")}
        shared["min_round_trip"] = screened.get("roundtrip.min_score")
    return shared
