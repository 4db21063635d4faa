"""Runs of train.py as an evaluation sees them: what they were trained on, their settings, their last metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from config.errors import UserError
from config.paths import find_path
from config.settings import DatasetSettings
from safer_instruct.text.examples import held_out, normalise
from safer_instruct.text.loading import LoadedExamples, RowLog
from safer_instruct.text.prompt_sets import EvaluationPrompt, Overlap
from safer_instruct.text.prompts import reversed_target
from safer_instruct.text.readers import read_rows

PUBLISHED_TEST_SET = "test_set.csv"  # beside published training files: train.py leaves its prompts out by itself
# Settings that name a run or its machine and say nothing about what was trained.
NOT_COMPARED = ("exp_name", "run_dir", "local_run_dir", "local_dirs", "device", "wandb", "checkpoint")
SHOWN_METRICS = ("loss/train", "loss/eval", "rewards_eval/accuracies", "rewards_eval/margins", "counters/examples")


def run_config(path: str) -> dict[str, Any] | None:
    """The settings that a run was trained with; `path` is the run, or a checkpoint or model folder in it."""
    folder = find_path(path)
    for candidate in (folder, *folder.resolve().parents[:3]):
        file = candidate / "config.yaml"
        if file.is_file():
            config = yaml.safe_load(file.read_text(encoding="utf-8"))
            return config if isinstance(config, dict) and "datasets" in config else None
    return None


def find_training_overlap(path: str, prompts: Sequence[EvaluationPrompt]) -> list[Overlap]:
    """Prompts that an evaluated run was trained on, one entry for each of its datasets that is still there.

    Rows that the run left out (its `exclude` file, the rows that it held out) are no overlap. Files are streamed.
    """
    config = run_config(path)
    datasets: Mapping[str, Any] = config["datasets"] if config else {}
    names = {field.name for field in fields(DatasetSettings)}
    overlaps = []
    for name, values in datasets.items():
        settings = DatasetSettings(**{key: value for key, value in values.items() if key in names})
        if find_path(settings.path).exists():
            overlaps.append(_overlap_with(name, settings, prompts))
    return overlaps


def find_induction_report(paths: Sequence[str]) -> str | None:
    """The report.json that induce.py wrote beside the data of one of these runs; None if there is none."""
    for path in paths:
        config = run_config(path)
        for values in config["datasets"].values() if config else ():
            file = find_path(values["path"]) / "report.json"
            if file.is_file() and "funnel" in json.loads(file.read_text(encoding="utf-8")):
                return str(file)
    return None


def _overlap_with(name: str, settings: DatasetSettings, prompts: Sequence[EvaluationPrompt]) -> Overlap:
    left_out = set(_excluded(settings))
    ids: dict[str, list[str]] = {}
    for prompt in prompts:
        key = normalise(prompt.instruction)
        is_held_out = settings.eval_path is None and held_out(prompt.instruction, settings.eval_fraction)
        if key not in left_out and not is_held_out:
            ids.setdefault(key, []).append(f"{prompt.set_name}/{prompt.id}")
    found: set[str] = set()
    examples = LoadedExamples(settings, settings.path, RowLog(name), pairs=False)
    for example in examples:
        found.update(ids.get(normalise(reversed_target(example.instruction or "", example.input)), ()))
    return Overlap(settings.path, examples.log.read, tuple(sorted(found)))


def _excluded(settings: DatasetSettings) -> Iterator[str]:
    path = find_path(settings.path)
    beside = (path if path.is_dir() else path.parent) / PUBLISHED_TEST_SET
    file = find_path(settings.exclude) if settings.exclude else beside if settings.schema == "si" else None
    if settings.exclude != "" and file is not None and file.is_file():
        for _, row in read_rows(file):
            yield normalise(reversed_target(str(row.get("instruction") or ""), str(row.get("input") or "")))


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A run of train.py: its name, its settings ("loss.beta" -> 0.1), and the last value of each of its metrics."""

    name: str
    path: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]


def read_training_run(name: str, folder: Path) -> TrainingRun:
    """A run from its `config.yaml` and `metrics.jsonl`; a torn last line, which a killed run can leave, is ignored.

    Raises:
        UserError: There is no metric in it yet, or a file in it cannot be read.
    """
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    file = folder / "metrics.jsonl"
    metrics: dict[str, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if not line.endswith("\n"):
                break
            raise UserError(f"{file}: a line of it is no JSON") from None
        metrics.update({key: float(value) for key, value in row.items() if isinstance(value, int | float)})
    if not metrics:
        raise UserError(f"{folder} is a run without a metric yet: let it train, or leave it out of compare=[...]")
    return TrainingRun(name, str(folder), dict(_flatten(config)), metrics)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def compare_training_runs(runs: Sequence[TrainingRun], sort_by: str | None) -> dict[str, Any]:
    """One table of runs: the settings that differ between them, and their last metrics.

    Args:
        runs: In the order of the command.
        sort_by: A metric, smallest first; with "-" before it largest first; None: as they come.

    Returns:
        `{"settings": [names], "metrics": [names shown], "runs": [{name, path, settings, metrics}]}`.

    Raises:
        UserError: No run has the metric.
    """
    keys = sorted({key for run in runs for key in run.settings if key.split(".")[0] not in NOT_COMPARED})
    differing = [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]
    known = sorted({metric for run in runs for metric in run.metrics})
    ordered = list(runs)
    shown = [metric for metric in SHOWN_METRICS if metric in known]
    if sort_by is not None:
        metric, largest_first = sort_by.removeprefix("-"), sort_by.startswith("-")
        if metric not in known:
            raise UserError(f"sort_by={sort_by}: no run has this metric; they have {', '.join(known)}")
        missing = math.inf if not largest_first else -math.inf
        ordered.sort(key=lambda run: run.metrics.get(metric, missing), reverse=largest_first)
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
