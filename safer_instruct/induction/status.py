"""The progress of an induction: rows, rate, time left and cost of each shard, read from the ledgers while they grow."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config.errors import UserError
from config.names import BENIGN_STAGES
from safer_instruct.experts.abstentions import NOT_ANSWERED
from safer_instruct.induction.ledger import WRITTEN_AT, parse_line, shard_count, shard_path
from safer_instruct.induction.ledgers import present_stages
from safer_instruct.text.display import markdown_table

RATE_SECONDS = 600.0  # the rate is measured over the last ten minutes of a ledger
QUIET_SECONDS = 120.0  # a shard that writes nothing for longer has stopped, or is waiting
_COST = re.compile(rb'"cost": ([0-9.e-]+)')
_REFUSED = re.compile(rf'"(reason|error)": "(abstain_)?({"|".join(NOT_ANSWERED)})'.encode())
_KEEP = re.compile(rb'"keep": true')
_TIME = re.compile(rb'"' + WRITTEN_AT.encode() + rb'": ([0-9.]+)\}$')


@dataclass(frozen=True, slots=True)
class StageProgress:
    """One stage of one shard."""

    done: int = 0  # rows with a final record
    rows: int | None = None  # rows of the stage in this shard; None if its ledger does not say yet
    kept: int = 0  # rows that the filter kept; 0 for other stages
    cost: float = 0.0  # at the expert's prices
    rate: float = 0.0  # rows per second over the last RATE_SECONDS of writing, 0 if nothing is being written
    written_at: float = 0.0  # time of the last record, in seconds since the epoch; 0 if there is none

    @property
    def is_done(self) -> bool:
        """Whether every row of the stage has a final record."""
        return self.rows is not None and self.done >= self.rows


def read_progress(path: Path, now: float) -> StageProgress:
    """Scan one ledger; an incomplete last line or a missing file is not an error.

    Lines are searched by patterns instead of parsed, as the ledgers of a large run have gigabytes.
    """
    rows, done, kept, cost = None, 0, 0, 0.0
    times: list[float] = []  # times of the records in the last RATE_SECONDS before the newest
    if not path.is_file():
        return StageProgress()
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not line.endswith(b"\n"):
                break
            if number == 0:
                rows = (parse_line(line) or {}).get("rows")
                continue
            done += _REFUSED.search(line) is None  # refused rows are retried
            kept += _KEEP.search(line) is not None
            if found := _COST.search(line):
                cost += float(found.group(1))
            if found := _TIME.search(line.rstrip()):
                times.append(float(found.group(1)))
                if len(times) > 4096 and times[2048] < times[-1] - RATE_SECONDS:
                    del times[:2048]
    recent = [moment for moment in times if moment >= times[-1] - RATE_SECONDS]
    is_live = bool(times) and now - times[-1] < QUIET_SECONDS
    span = max(recent[-1] - recent[0], 1.0) if recent else 1.0
    return StageProgress(done, rows, kept, cost, len(recent) / span if is_live else 0.0, times[-1] if times else 0.0)


def render_status(folder: Path, now: float | None = None) -> str:
    """Return a table of the unfinished shards, and the totals over all shards.

    Raises:
        UserError: There are no ledgers.
    """
    count = shard_count(folder)
    if count is None:
        raise UserError(f"{folder}: no ledgers yet; give the output=FOLDER of a run that has started")
    now = time.time() if now is None else now
    stages = _stages(folder)
    shards = [
        {stage: read_progress(shard_path(folder, stage, i, count), now) for stage in stages} for i in range(count)
    ]
    lines = list(_unfinished(shards, now))
    table = markdown_table(["shard", *stages, "rows/s", "left", "cost", "last row"], lines) if lines else ""
    return f"{table}\n\n{_sums(shards, stages)}\n{count - len(lines)} of {count} shards are done.".strip()


def live_line(folder: Path) -> str:
    """Return the number of records, rate and cost for each kind of ledger in a folder."""
    now = time.time()
    kinds: dict[str, list[StageProgress]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        kinds.setdefault(path.name.partition("-")[0], []).append(read_progress(path, now))
    parts = []
    for kind, found in kinds.items():
        done, rate, cost = (sum(getattr(one, name) for one in found) for name in ("done", "rate", "cost"))
        parts.append(f"{kind} {done} rows, {rate:.1f} rows/s" + (f", cost {cost:.2f}" if cost else ""))
    return "; ".join(parts) or "no row yet"


def _stages(folder: Path) -> list[str]:
    """Return the stages whose ledgers are in a folder."""
    for names in BENIGN_STAGES.values():
        if any(folder.glob(f"{names[0]}-*.jsonl")):
            return list(names)
    return present_stages(folder)


def _unfinished(shards: list[dict[str, StageProgress]], now: float) -> Iterator[list[str]]:
    for index, stages in enumerate(shards):
        if all(progress.is_done for progress in stages.values()):
            continue
        current = next(progress for progress in stages.values() if not progress.is_done)
        last = max(progress.written_at for progress in stages.values())
        cost = sum(progress.cost for progress in stages.values())
        yield [
            str(index),
            *(_share(progress) for progress in stages.values()),
            f"{current.rate:.1f}",
            _left(current),
            f"{cost:.2f}",
            f"{_duration(now - last)} ago" if last else "-",
        ]


def _sums(shards: list[dict[str, StageProgress]], stages: list[str]) -> str:
    """Return one line per stage: rows done and known, total rate, time left at that rate, and cost."""
    lines = []
    for stage in stages:
        of_stage = [shard[stage] for shard in shards]
        done, rate = sum(one.done for one in of_stage), sum(one.rate for one in of_stage)
        known = [one.rows for one in of_stage if one.rows is not None]
        # Shards are of similar size, so each one without a ledger counts as the mean of the others.
        rows = round(sum(known) / len(known) * len(shards)) if known else 0
        about = "" if len(known) == len(shards) else "about "
        kept = f", {sum(one.kept for one in of_stage)} kept" if stage == "filter" else ""
        cost = sum(one.cost for one in of_stage)
        left = _duration((rows - done) / rate) if rate and rows > done else "-"
        lines.append(
            f"{stage}: {done} of {about}{rows} rows{kept}, {rate:.1f} rows/s, {left} left"
            + (f", cost {cost:.2f}" if cost else "")
        )
    return "\n".join(lines)


def _share(progress: StageProgress) -> str:
    return f"{progress.done}/{'?' if progress.rows is None else progress.rows}"


def _left(progress: StageProgress) -> str:
    if progress.rows is None or not progress.rate:
        return "-"
    return _duration((progress.rows - progress.done) / progress.rate)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
