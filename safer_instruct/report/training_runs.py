"""Read runs of train.py for an evaluation: what they were trained on, their settings, and their last metrics."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.checksums import hash_prefix
from config.errors import UserError
from config.paths import find_path
from config.reading import read_json_lines, read_mapping
from config.run_keys import flatten
from config.settings import DatasetSettings
from safer_instruct.generation.trained_as import run_datasets
from safer_instruct.generation.weights import require_as_saved
from safer_instruct.text.examples import held_out
from safer_instruct.text.exclusion import exclude_file, read_instruction_keys, turn_keys
from safer_instruct.text.loading import LoadedExamples, RowLog
from safer_instruct.text.prompt_sets import Overlap

# Settings that only name a run or its machine, and do not affect what was trained.
NOT_COMPARED = ("exp_name", "run_dir", "local_run_dir", "local_dirs", "device", "wandb", "checkpoint")
SHOWN_METRICS = ("loss/train", "loss/eval", "rewards_eval/accuracies", "rewards_eval/margins", "counters/examples")


def find_training_overlap(path: str, asked: Mapping[str, Sequence[str]]) -> list[Overlap]:
    """Find which instructions a model was trained on, in each dataset of its run that still exists.

    Rows that the run left out (excluded, or held out for its own evaluation) do not count. Files are streamed.

    Args:
        path: The run, or a checkpoint or model folder in it.
        asked: The instructions to look for: their `instruction_key` -> the names to report them by.
    """
    datasets = run_datasets(path)
    held_out_keys: set[str] = set()  # train.py drops the instructions of every evaluation file from all datasets
    for name, settings in datasets.items():
        if settings.eval_path is not None and find_path(settings.eval_path).exists():
            loaded = LoadedExamples(settings, settings.eval_path, RowLog(name), pairs=False)
            held_out_keys.update(turn_keys(one)[0] for one in loaded)
    return [
        _overlap_with(name, settings, asked, held_out_keys)
        for name, settings in datasets.items()
        if find_path(settings.path).exists()
    ]


def _overlap_with(
    name: str, settings: DatasetSettings, asked: Mapping[str, Sequence[str]], held_out_keys: Set[str]
) -> Overlap:
    exclude = exclude_file(settings)
    if exclude is not None and not exclude.exists():
        exclude = None  # moved since then; reporting too much overlap is better than no report
    excluded = set(read_instruction_keys(exclude))
    found: set[str] = set()
    examples = LoadedExamples(settings, settings.path, RowLog(name), pairs=False)
    for example in examples:
        keys = turn_keys(example)
        by_hash = settings.eval_path is None and held_out(example.user_turns[0][0], settings.eval_fraction)
        if excluded.isdisjoint(keys) and keys[0] not in held_out_keys and not by_hash:
            found.update(name for key in keys for name in asked.get(key, ()))
    return Overlap(settings.path, examples.log.read, tuple(sorted(found)))


def find_induction_report(paths: Sequence[str]) -> str | None:
    """Find the report.json that induce.py wrote next to the data of one of these runs; None if there is none."""
    for path in paths:
        for settings in run_datasets(path).values():
            file = find_path(settings.path) / "report.json"
            if file.is_file() and "funnel" in read_mapping(file):
                return str(file)
    return None


def read_metrics(file: Path) -> Iterator[dict[str, float]]:
    """Yield the numbers of each row of a metrics.jsonl; see `read_json_lines`."""
    for row in read_json_lines(file):
        yield {key: _number(value) for key, value in row.items() if isinstance(value, int | float)}


def _number(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A run of train.py."""

    name: str  # name of its folder
    path: str  # its folder
    settings: Mapping[str, Any]  # "loss.beta" -> 0.1
    metrics: Mapping[str, float]  # the last value of each
    held_out: int = 0  # rows in each of its evaluations; 0 if its manifest does not say


def read_training_run(name: str, folder: Path) -> TrainingRun:
    """Read a run from its `config.yaml` and `metrics.jsonl`.

    Raises:
        UserError: It has no metrics yet, or one of its files cannot be read or has been truncated or changed.
    """
    _require_logged(folder, "metrics.jsonl")
    config = read_mapping(folder / "config.yaml", "copy the run again")
    metrics: dict[str, float] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        metrics.update(row)
    if not metrics:
        raise UserError(f"{folder} is a run without metrics yet: let it train, or leave it out of compare=[...]")
    return TrainingRun(name, str(folder), dict(flatten(config)), metrics, _held_out(folder, config))


def _held_out(folder: Path, config: Mapping[str, Any]) -> int:
    """Return the number of rows in each evaluation of the run; 0 if unknown."""
    file = folder / "manifest.json"
    data = read_mapping(file, "copy the run again").get("data") if file.is_file() else None
    try:
        rows = int(data["eval"]["rows"]) if data else 0
        return max(0, min(rows, int(config.get("n_eval_examples") or rows)))
    except (LookupError, TypeError, ValueError, OverflowError):  # the manifest is of an earlier version, or edited
        return 0


def _require_logged(folder: Path, name: str) -> None:
    """Raise a UserError unless a log of the run still begins with the bytes recorded by its newest checkpoint."""
    progress = folder / "LATEST" / "state" / "progress.json"
    if not progress.is_file():
        return
    require_as_saved(progress)
    files = read_mapping(progress, "copy the run again")["log"].get("files", {})
    size, digest = files.get(name, (0, ""))
    if size and (os.path.getsize(folder / name) < size or hash_prefix(folder / name, size) != digest):
        raise UserError(
            f"{folder / name}: its first {size} bytes are not those that the newest checkpoint recorded; copy the run "
            "again, or leave it out of compare=[...]"
        )


def compare_training_runs(runs: Sequence[TrainingRun], sort_by: str | None) -> dict[str, Any]:
    """Compare runs in one table: the settings that differ between them, and their last metrics.

    Args:
        runs: The runs, in the order of the command.
        sort_by: The metric to sort by, smallest first; with a leading "-", largest first; None keeps the order.

    Returns:
        `{"settings": [names], "metrics": [names shown], "runs": [{name, path, settings, metrics}]}`.

    Raises:
        UserError: No run has the metric.
    """
    keys = sorted({key for run in runs for key in run.settings if key.split(".")[0] not in NOT_COMPARED})
    # Compared by repr, since a value may be an unhashable list; this also tells 1 from True.
    differing = [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]
    known = sorted({metric for run in runs for metric in run.metrics})
    ordered = list(runs)
    shown = [metric for metric in SHOWN_METRICS if metric in known]
    if sort_by is not None:
        metric, largest_first = sort_by.removeprefix("-"), sort_by.startswith("-")
        if metric not in known:
            raise UserError(f"sort_by={sort_by}: no run has this metric; they have {', '.join(known)}")
        last = -math.inf if largest_first else math.inf  # where a run without the metric goes
        values = {id(run): run.metrics.get(metric, math.nan) for run in runs}
        ordered.sort(key=lambda run: last if math.isnan(values[id(run)]) else values[id(run)], reverse=largest_first)
        shown = [metric, *(name for name in shown if name != metric)]
    rows = [
        {
            "name": run.name,
            "path": run.path,
            "settings": {key: run.settings.get(key) for key in differing},
            "metrics": {key: value if math.isfinite(value) else None for key, value in run.metrics.items()},
        }
        for run in ordered
    ]
    return {"settings": differing, "metrics": shown, "runs": rows}
