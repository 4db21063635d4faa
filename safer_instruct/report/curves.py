"""Read the training curves of a run from its `metrics.jsonl`, and draw them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from config.errors import UserError
from config.paths import find_path
from safer_instruct.generation.weights import run_config
from safer_instruct.report.plots import MARKERS, MODEL_COLORS, Plot, new_axes, styled, to_svg
from safer_instruct.report.training_runs import read_metrics
from safer_instruct.text.display import short_name

EXAMPLES = "counters/examples"  # x-axis
MAX_POINTS = 300  # per line: more cannot be told apart in a figure
# Title, y-axis, and {legend: metric} of the lines; a run shows the figures that it has metrics for.
LOSS = ("loss", "nats", {"training": "loss/train", "held out": "loss/eval"})
# For preference training: the total loss would add up these quantities, so each has its own figure.
PREFERENCE = (
    ("preference loss", "nats per pair", {"training": "preference_loss_train", "held out": "preference_loss_eval"}),
    (
        "log-probabilities",
        "nats per response",
        {
            "chosen, training": "logps_train/chosen", "rejected, training": "logps_train/rejected",
            "chosen, held out": "logps_eval/chosen", "rejected, held out": "logps_eval/rejected",
        },
    ),
    ("likelihood of the chosen", "nats per token", {"training": "nll_train", "held out": "nll_eval"}),
    ("reward margin", "chosen - rejected", {"training": "rewards_train/margins", "held out": "rewards_eval/margins"}),
)  # fmt: skip
REFUSALS = (
    "refusals of sampled prompts",
    "share",
    {"unsafe": "refusals_eval/unsafe", "benign": "refusals_eval/benign"},
)
# Losses that equal ln 2 when the policy prefers neither response.
LOGISTIC = frozenset({"dpo", "cdpo", "robust", "dpo_norm"})
# Figures of several runs over each other: title, y-axis, metric. Losses of different kinds share no axis.
COMPARED_LOSSES = (("Training loss", "nats", "loss/train"), ("Held-out loss", "nats", "loss/eval"))
COMPARED = (
    ("Held-out reward accuracy", "accuracy", "rewards_eval/accuracies"),
    ("Held-out reward margin", "chosen - rejected", "rewards_eval/margins"),
    ("Over-refusal of sampled benign prompts", "share", "refusals_eval/benign"),
)
MAX_RUNS = 12  # in one figure
METRICS = {metric for _, _, lines in (LOSS, *PREFERENCE, REFUSALS) for metric in lines.values()} | {
    metric for _, _, metric in (*COMPARED_LOSSES, *COMPARED)
}
FEW = 25  # a line with at most this many points has markers, to show where it was measured

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class RunCurves:
    """The curves of one run by metric, and the name of its loss ("" if unknown)."""

    points: Mapping[str, Points]
    loss: str = ""

    def of(self, metric: str) -> Points:
        """Return the points of a metric; [] if the run has none."""
        return self.points.get(metric, [])


def read_curves(name: str, run_path: str) -> RunCurves:
    """Read the points (examples seen, value) of every metric that a figure draws, thinned to `MAX_POINTS`.

    A resumed run may have logged some steps twice; the last line for each number of examples counts.

    Raises:
        UserError: The run's metrics.jsonl is missing or cannot be read.
    """
    file = find_path(run_path) / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"curves.{name}={run_path}: it holds no metrics.jsonl; name the folder of a run of train.py")
    values: dict[str, dict[float, float]] = {metric: {} for metric in METRICS}
    for row in read_metrics(file):
        for metric in METRICS & row.keys() if EXAMPLES in row else ():
            if math.isfinite(row[metric]):
                values[metric][row[EXAMPLES]] = row[metric]
    loss = (run_config(run_path).get("loss") or {}).get("name", "")
    return RunCurves({metric: thin(sorted(points.items())) for metric, points in values.items()}, str(loss))


def thin(points: Points, limit: int = MAX_POINTS) -> Points:
    """Return at most `limit` points: means of neighbours, because picking single points would show their noise."""
    width = math.ceil(len(points) / limit)
    if width <= 1:
        return points
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def plot_runs(runs: Mapping[str, RunCurves]) -> list[Plot]:
    """Draw each run: its loss (or the parts of a preference loss), and the refusals of sampled prompts."""
    plots = [plot for name, run in runs.items() for plot in _plots_of_run(name, run)]
    return [plot for plot in plots if plot is not None]


def _plots_of_run(name: str, run: RunCurves) -> Iterator[Plot | None]:
    prefers = bool(run.of("preference_loss_train") or run.of("preference_loss_eval"))
    for title, unit, lines in (*(PREFERENCE if prefers else (LOSS,)), REFUSALS):
        level = None
        if title == "preference loss" and run.loss in LOGISTIC:
            level = (math.log(2), "ln 2: prefers neither")
        yield plot_curves(f"{name}: {title}", unit, {words: run.of(key) for words, key in lines.items()}, level)


def plot_compared(runs: Mapping[str, RunCurves]) -> list[Plot]:
    """Draw one figure per metric (for losses, one per kind of loss), with a line for each of the first `MAX_RUNS`."""
    shown = dict(list(runs.items())[:MAX_RUNS])
    note = f" (the first {MAX_RUNS} runs)" if len(runs) > MAX_RUNS else ""
    kinds = sorted({run.loss for run in shown.values()})
    plots = [
        plot_curves(
            f"{title}{f', {kind}' if len(kinds) > 1 else ''}{note}",
            unit,
            {name: run.of(metric) for name, run in shown.items() if run.loss == kind},
        )
        for title, unit, metric in COMPARED_LOSSES
        for kind in kinds
    ]
    plots += [
        plot_curves(title + note, unit, {name: run.of(metric) for name, run in shown.items()})
        for title, unit, metric in COMPARED
    ]
    return [plot for plot in plots if plot is not None]


def plot_curves(
    title: str, unit: str, curves: Mapping[str, Points], level: tuple[float, str] | None = None
) -> Plot | None:
    """Draw lines over examples seen; None if no curve has a point.

    `unit` labels the y-axis ("nats"). `level` is a value to draw as a dotted line, and its legend. The points of a
    curve are (examples seen, value), ascending.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    with styled():
        axes = new_axes(2.5)
        if level is not None:
            axes.axhline(level[0], color="#6B7480", linewidth=1.0, linestyle=":", label=level[1])
        for index, (name, points) in enumerate(curves.items()):
            axes.plot(*zip(*points, strict=True), **_line(index, points), label=short_name(name, 30))
        axes.set_xlabel("examples seen")
        axes.set_ylabel(unit)
        axes.grid(visible=False, axis="x")
        axes.margins(x=0.02)
        svg = to_svg(axes)
    described = "; ".join(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in curves.items())
    return Plot(title, f"{title}, over examples seen. {described}.", svg)


def _line(index: int, points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return the style of line number `index`: one or two points are not joined, as nothing is known in between."""
    return {
        "color": MODEL_COLORS[index % len(MODEL_COLORS)],
        "linewidth": 1.5,
        "marker": MARKERS[index % len(MARKERS)] if len(points) <= FEW else None,
        "markersize": 3 if len(points) > 2 else 5,
        "linestyle": ("-", "--", ":", "-.")[index % 4] if len(points) > 2 else "none",
    }
