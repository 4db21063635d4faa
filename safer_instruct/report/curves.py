"""The training curves of a run, read from its `metrics.jsonl`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from config.errors import UserError
from config.paths import find_path
from safer_instruct.report.plots import Plot, plot_curves
from safer_instruct.report.training_runs import read_metrics

EXAMPLES = "counters/examples"  # x-axis
MAX_POINTS = 300  # of one line: more cannot be told apart in a figure
# Title, y-axis, and for each line its words and its metric; a run shows the figures that it has metrics for.
FIGURES = (
    ("loss", "loss (nats)", {"training": "loss/train", "held out": "loss/eval"}),
    ("reward margin", "chosen - rejected", {"training": "rewards_train/margins", "held out": "rewards_eval/margins"}),
    ("refusals of sampled prompts", "share", {"unsafe": "refusals_eval/unsafe", "benign": "refusals_eval/benign"}),
)
# Figures of several runs over each other: title, y-axis, metric.
COMPARED = (
    ("Training loss", "loss (nats)", "loss/train"),
    ("Held-out loss", "loss (nats)", "loss/eval"),
    ("Held-out reward accuracy", "accuracy", "rewards_eval/accuracies"),
    ("Held-out reward margin", "chosen - rejected", "rewards_eval/margins"),
    ("Over-refusal of sampled benign prompts", "share", "refusals_eval/benign"),
)
MAX_RUNS = 12  # in one figure
METRICS = {metric for _, _, lines in FIGURES for metric in lines.values()} | {metric for _, _, metric in COMPARED}

Points = list[tuple[float, float]]


def read_curves(name: str, run_path: str) -> dict[str, Points]:
    """Read the points (examples seen, value) of every metric that a figure draws, thinned to `MAX_POINTS`.

    A run that was killed and resumed may have written a stretch twice: the last line of a position counts.

    Raises:
        UserError: The run has no metrics.jsonl, or one that cannot be read.
    """
    file = find_path(run_path) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"curves.{name}={run_path}: no metrics.jsonl in it; name the folder of a run of train.py")
    values: dict[str, dict[float, float]] = {metric: {} for metric in METRICS}
    for row in read_metrics(file):
        for metric in METRICS & row.keys() if EXAMPLES in row else ():
            if math.isfinite(row[metric]):
                values[metric][row[EXAMPLES]] = row[metric]
    return {metric: thin(sorted(points.items())) for metric, points in values.items()}


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """Return at most `limit` points: means of neighbours, which smooth the noise where picking would sample it."""
    width = math.ceil(len(points) / limit)
    if width <= 1:
        return points
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def plot_runs(runs: Mapping[str, Mapping[str, Points]]) -> list[Plot]:
    """Draw all runs: losses first, a figure for each run, since losses of different kinds share no scale."""
    plots = [
        plot_curves(f"{name}: {title}", unit, {words: curves[metric] for words, metric in lines.items()})
        for title, unit, lines in FIGURES
        for name, curves in runs.items()
    ]
    return [plot for plot in plots if plot is not None]


def plot_compared(runs: Mapping[str, Mapping[str, Points]]) -> list[Plot]:
    """Draw one figure for each metric, with a line for each of the first `MAX_RUNS` runs."""
    shown = dict(list(runs.items())[:MAX_RUNS])
    note = f" (the first {MAX_RUNS} runs)" if len(runs) > MAX_RUNS else ""
    plots = [
        plot_curves(title + note, unit, {name: curves[metric] for name, curves in shown.items()})
        for title, unit, metric in COMPARED
    ]
    return [plot for plot in plots if plot is not None]
