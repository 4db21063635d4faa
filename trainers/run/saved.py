"""What a run has saved: its checkpoints, the progress in each, and the links to the newest and the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.files import replacing, sync
from config.paths import saved_checkpoints
from config.searches import lower_is_better
from config.settings import CheckpointSettings, TrainConfig
from trainers.run.run_dir import RunDir, remove


@dataclass
class RunProgress:
    """The progress of a run, without weights, optimizer and random state. All of it is JSON."""

    examples: int = 0  # seen so far; with the seed, this is the position in the data
    updates: int = 0  # optimizer steps taken
    skipped: int = 0  # steps skipped because they were not finite
    refreshed_at: int = 0  # examples seen when the reference was last renewed
    evaluated_at: int = -1  # examples seen at the last evaluation; -1: none yet
    evaluation: dict[str, float] = field(default_factory=dict)  # the metrics of that evaluation
    identity: dict[str, str] = field(default_factory=dict)  # must be unchanged on resume: keys of data and weights
    objective: dict[str, float] = field(default_factory=dict)  # state of the objective across batches
    log: dict[str, Any] = field(default_factory=dict)  # state of the metrics log: lengths of its files, wandb id


def unusable(folder: Path, damage: str) -> UserError:
    """Return the error for a damaged checkpoint, with the way out."""
    return UserError(
        f"checkpoint {folder} cannot be used ({damage}); delete that folder to resume from the previous one (or from "
        "the beginning, if there is none)."
    )


def read_progress(folder: Path) -> RunProgress:
    """Read the progress of the run at a checkpoint.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        return RunProgress(**json.loads((folder / "state" / "progress.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise unusable(folder, "state/progress.json cannot be read") from error


def discard(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a crash leaves no partial one that looks complete."""
    discarded = folder.with_name(f".{folder.name}.discarded.partial")
    folder.rename(discarded)
    remove(discarded)


def require_measured(settings: TrainConfig, evaluation: Mapping[str, float]) -> None:
    """Raise a UserError if an evaluation lacks the metric of `checkpoint.keep_best` or `sweep_metric`."""
    named = {"checkpoint.keep_best": settings.checkpoint.keep_best, "sweep_metric": settings.sweep_metric}
    for key, metric in named.items():
        if metric is not None and metric not in evaluation:
            raise UserError(
                f"{key}={metric}: an evaluation of this run does not measure it; choose one of "
                f"{', '.join(sorted(evaluation)) or 'none: nothing is held out'}."
            )


def best_checkpoint(folders: list[Path], metric: str | None) -> Path | None:
    """Return the checkpoint with the best evaluation at its own step (ties: the latest), or None."""
    if metric is None:
        return None
    scores = {}
    for folder in folders:
        progress = read_progress(folder)
        value = progress.evaluation.get(metric, math.nan)  # a NaN is neither better nor worse than others
        if progress.evaluated_at == progress.examples and not math.isnan(value):
            scores[folder] = (-value if lower_is_better(metric) else value, progress.examples)
    return max(scores, key=lambda folder: scores[folder], default=None)


def repair_links(run: RunDir, settings: CheckpointSettings) -> None:
    """Point LATEST and BEST at the right checkpoints; call it under the run's lock.

    They are stale if a process was killed after it had written a checkpoint and before it updated the links.

    Raises:
        UserError: One of them is a folder, not a link: a copy of the run followed the link, and would never change.
    """
    for link in (run.latest, run.best):
        if link.exists() and not link.is_symlink():
            raise UserError(
                f"{link} is not a link: copying this run replaced it by a copy of old weights. Delete it; it is made "
                f"again from {run.checkpoints}. `cp -a` keeps links."
            )
    folders = saved_checkpoints(run.path)
    targets = {run.latest: folders[-1] if folders else None, run.best: best_checkpoint(folders, settings.keep_best)}
    for link, target in targets.items():
        if target is not None:
            point(link, target)
        elif link.is_symlink() and not link.exists():
            link.unlink()


def point(link: Path, target: Path) -> None:
    """Point a link of the run directory at a checkpoint, atomically: a reader sees the old or the new target."""
    with replacing(link) as partial:
        partial.unlink(missing_ok=True)  # left over if a process was killed here
        partial.symlink_to(target.relative_to(link.parent))
    for folder in (target.parent, link.parent):
        sync(folder)
