"""Draw a sweep of runs: what each run gained against its KL to the reference, and settings against results.

Each run is labelled with its number, the same in all figures: its row in the table of the runs.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from config.losses import LOSSES
from config.pair_losses import PreferenceLossSettings
from config.paths import find_path
from safer_instruct.measures.statistics import wilson_interval
from safer_instruct.report.curves import MAX_RUNS
from safer_instruct.report.plots import FAINT, INK, MARKERS, MODEL_COLORS, Plot, new_axes, styled, to_svg, whiskers
from safer_instruct.report.tables import NOT_COUNTED, Models
from safer_instruct.report.training_runs import TrainingRun
from safer_instruct.text.display import percent, short_name

Rate = Mapping[str, Any]  # value, low, high, n, words, unit (of n); low and high are None if unknown
ACCURACY = "rewards_eval/accuracies"
# The result of an evaluation to draw is the first of these that two runs have: metric, label.
JUDGED = (("safe_and_useful", "Safe and useful (harmonic mean)"), ("safety", "Declined, or helped safely"))
# The result axes of the parallel coordinates: metric, label.
ENDS = (
    (ACCURACY, "held-out accuracy"),
    ("loss/eval", "held-out loss"),
    ("rewards_eval/margins", "held-out margin"),
    ("refusals_eval/benign", "over-refusal"),
)
MAX_SETTINGS, MAX_ENDS = 4, 3  # axes: more would be unreadable on a phone
DECADE = 10.0
LABEL_GAP = 0.09  # share of an axis: labels closer than this would overlap


def plot_sweep(runs: Sequence[TrainingRun], differing: Sequence[str], models: Models) -> list[Plot]:
    """Draw the first `MAX_RUNS` runs; [] if no setting differs, or nothing was measured for two of them.

    The runs are in the order of their table. `models` is `report["models"]`; a model belongs to a run if its path is in
    the run's folder.
    """
    if not differing:
        return []
    numbered = {number: run for number, run in enumerate(runs[:MAX_RUNS], start=1)}
    judged = next((found for key, words in JUDGED if len(found := _judged(numbered, models, key, words)) > 1), {})
    plots = plot_frontiers(numbered, judged)
    parallel = plot_parallel(numbered, differing, judged)
    return plots if parallel is None else [*plots, parallel]


def _judged(runs: Mapping[int, TrainingRun], models: Models, key: str, words: str) -> dict[int, Rate]:
    """Return one rate of the models inside the folders of the runs, by the number of the run."""
    found: dict[int, Rate] = {}
    for model in models.values():
        folder = find_path(str(model["path"])).resolve()
        for number, run in runs.items():
            rate = model.get(key, NOT_COUNTED)
            if rate["n"] and Path(run.path).resolve() in (folder, *folder.parents):
                found[number] = {**rate, "words": words, "unit": "prompts"}
    return found


def held_out_accuracy(run: TrainingRun) -> Rate | None:
    """Return the last held-out reward accuracy, with its Wilson interval if the number of pairs is known."""
    value = run.metrics.get(ACCURACY)
    if value is None or not 0 <= value <= 1:  # NaN, too
        return None
    low, high = wilson_interval(round(value * run.held_out), run.held_out) if run.held_out else (None, None)
    about = {"words": "Held-out reward accuracy", "unit": "held-out pairs"}
    return {"value": value, "low": low, "high": high, "n": run.held_out, **about}


def _beta(run: TrainingRun) -> float:
    """Return the beta of a run; NaN if its loss has none."""
    beta: Any = run.settings.get("loss.beta")
    return float(beta) if _is_number(beta) and beta > 0 else math.nan


def logged_kl(run: TrainingRun) -> float | None:
    """Return `kl_eval`, logged by losses on single answers: log policy/reference of other rows' answers (KTO's z0)."""
    return _finite(run.metrics.get("kl_eval"))


def estimated_kl(run: TrainingRun) -> float | None:
    """Estimate KL(reference || policy), in nats per response, from the rewards of a run trained on pairs.

    DPO assumes that both responses of a pair are samples of the reference. Then this divergence is the mean of
    log reference/policy over them, -(reward of chosen + reward of rejected) / (2 beta). None if the rewards of the
    loss are not sums of a response's log-ratios.
    """
    kind = LOSSES.get(str(run.settings.get("loss.name")))
    if kind is None or not issubclass(kind, PreferenceLossSettings) or kind.normalised or logged_kl(run) is not None:
        return None
    if run.settings.get("loss.reference_free") or run.settings.get("loss.average_logps"):
        return None
    rewards = [run.metrics.get(f"rewards_eval/{side}", math.nan) for side in ("chosen", "rejected")]
    return _finite(-sum(rewards) / (2 * _beta(run)))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# Each measure of KL with the label of its x-axis and its sentence in the caption.
MEASURES: tuple[tuple[Callable[[TrainingRun], float | None], str, str], ...] = (
    (logged_kl, "KL to the reference, nats (kl_eval)", "KL: kl_eval as the last evaluation logged it."),
    (
        estimated_kl,
        "KL to the reference, nats per response (estimate)",
        "KL: mean of log reference/policy over the held-out responses, from the rewards that the last evaluation "
        "logged; it may be below 0 if the reference would not write such responses.",
    ),
)


def plot_frontiers(runs: Mapping[int, TrainingRun], judged: Mapping[int, Rate]) -> list[Plot]:
    """Draw results against KL to the reference, one point per run: a figure for each pair of measures two runs have."""
    accuracies = {number: rate for number, run in runs.items() if (rate := held_out_accuracy(run)) is not None}
    plots = []
    for (kl_of, axis, words), rates in product(MEASURES, (judged, accuracies)):
        measured = {number: kl for number in rates if (kl := kl_of(runs[number])) is not None}
        kls = {number: measured[number] for number in sorted(measured, key=lambda number: _beta(runs[number]))}
        if len(kls) > 1:
            plots.append(_frontier(runs, kls, rates, axis, words))
    return plots


def _frontier(
    runs: Mapping[int, TrainingRun], kls: Mapping[int, float], rates: Mapping[int, Rate], axis: str, words: str
) -> Plot:
    outcome = next(iter(rates.values()))["words"]
    betas = sorted({_beta(runs[number]) for number in kls})
    colors = dict(zip(betas, matplotlib.colormaps["viridis"]([0.75 * _between(b, betas) for b in betas]), strict=True))
    named: set[float] = set()
    with styled():
        axes = new_axes(3.0)
        for number, kl in kls.items():
            beta, rate = _beta(runs[number]), rates[number]
            ends = None if rate["low"] is None else whiskers([rate])
            drawn = axes.errorbar(
                kl, rate["value"], yerr=ends, fmt=MARKERS[betas.index(beta) % len(MARKERS)],
                color=colors[beta], markersize=5.5, elinewidth=1.2, capsize=1.8,
                label="_" if beta in named else f"beta {beta:g}",
            )  # fmt: skip
            named.add(beta)
            drawn.lines[0].set_gid(f"run-{number}")
            for whisker in drawn.lines[2]:
                whisker.set_gid(f"interval-{number}")
            above = kl, rate["value"] if ends is None else max(rate["value"], rate["high"])
            axes.annotate(str(number), above, (0, 4), textcoords="offset points", fontsize=8, ha="center")
        if _is_log(sorted(kls.values())):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1, y=0.12)
        axes.set_xlabel(axis)
        axes.set_ylabel(outcome[0].lower() + outcome[1:])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        svg = to_svg(axes, legend_columns=4)
    described = "; ".join(
        f"{short_name(runs[number].name, 60)}: KL {kl:.3g}, {_rate_words(rates[number])}" for number, kl in kls.items()
    )
    title = f"{outcome} against KL to the reference"
    return Plot(title, f"{title}, coloured by beta. {described}.", svg, _frontier_caption(runs, kls, rates, words))


def _rate_words(rate: Rate) -> str:
    interval = "" if rate["low"] is None else f" [{percent(rate['low'])}, {percent(rate['high'])}]"
    return f"{percent(rate['value'])}%{interval}"


def _frontier_caption(
    runs: Mapping[int, TrainingRun], kls: Mapping[int, float], rates: Mapping[int, Rate], words: str
) -> str:
    names = "; ".join(f"{number} {short_name(runs[number].name, 40)}" for number in kls)
    sizes = sorted({rates[number]["n"] for number in kls if rates[number]["low"] is not None})
    whiskers = "no whiskers: n is not known"
    if sizes:
        counted = " to ".join(f"{n:,}" for n in dict.fromkeys((sizes[0], sizes[-1])))
        whiskers = f"whiskers: 95% interval, n = {counted} {next(iter(rates.values()))['unit']} for each"
    return f"A point for each of {len(kls)} runs ({names}); {whiskers}. {words}"


@dataclass(frozen=True, slots=True)
class Coordinate:
    """One axis of the parallel coordinates: the place of each run on it (0 to 1, or NaN), and its (place, label)s."""

    name: str
    places: list[float]
    labels: list[tuple[float, str]]


def plot_parallel(runs: Mapping[int, TrainingRun], differing: Sequence[str], judged: Mapping[int, Rate]) -> Plot | None:
    """Draw one line per run across the settings that differ and then its results; None if either is missing."""
    ends: list[tuple[str, list[Any]]] = [
        (words, [run.metrics.get(metric, math.nan) for run in runs.values()]) for metric, words in _ends(differing)
    ]
    if judged:
        words = next(iter(judged.values()))["words"]
        ends.insert(0, (words, [judged[number]["value"] if number in judged else math.nan for number in runs]))
    ends = [(words, values) for words, values in ends if sum(map(math.isfinite, values)) > 1][:MAX_ENDS]
    settings = [(key, [run.settings.get(key) for run in runs.values()]) for key in differing]
    settings = [(key, values) for key, values in settings if len(set(map(repr, values))) > 1]
    settings.sort(key=lambda item: not all(map(_is_number, item[1])))  # numbers first
    if not ends or not settings:
        return None
    shown, left_out = settings[:MAX_SETTINGS], [key for key, _ in settings[MAX_SETTINGS:]]
    coordinates = [coordinate(name, values) for name, values in [*_short_keys(shown), *ends]]
    with styled():
        axes = new_axes(3.3 + 0.08 * len(runs))
        for index, (number, run) in enumerate(runs.items()):
            axes.plot(
                range(len(coordinates)), [one.places[index] for one in coordinates], gid=f"run-{number}",
                color=MODEL_COLORS[index % len(MODEL_COLORS)], marker=MARKERS[index % len(MARKERS)], markersize=4.5,
                linestyle=("-", "--")[index // len(MODEL_COLORS)], linewidth=1.4,
                label=f"{number} {short_name(run.name, 28)}",
            )  # fmt: skip
        _draw_coordinates(axes, coordinates)
        svg = to_svg(axes)
    described = "; ".join(
        f"{number} {short_name(run.name, 60)}: "
        + ", ".join(
            f"{short_name(name, 60)} {short_name(_written(values[index]), 60)}" for name, values in [*shown, *ends]
        )
        for index, (number, run) in enumerate(runs.items())
    )
    caption = (
        f"A line for each of {len(runs)} runs, across the settings that differ and then the results. Each axis goes "
        "from the lowest value to the highest; log: its values span a decade. Single values, without intervals."
        + (f" Not drawn: {', '.join(short_name(key, 60) for key in left_out)}." if left_out else "")
    )
    title = "Settings and results"
    return Plot(title, f"{title}, as parallel coordinates. {described}.", svg, caption)


def _ends(differing: Sequence[str]) -> list[tuple[str, str]]:
    """Return (metric, label) of the possible result axes; losses of different kinds never share an axis."""
    return [end for end in ENDS if end[0] != "loss/eval" or "loss.name" not in differing]


def _short_keys(settings: Sequence[tuple[str, list[Any]]]) -> list[tuple[str, list[Any]]]:
    """Name each setting by the last part of its key if that is unique."""
    last = [key.rpartition(".")[2] for key, _ in settings]
    return [(word if last.count(word) == 1 else key, of) for word, (key, of) in zip(last, settings, strict=True)]


def coordinate(name: str, values: Sequence[Any]) -> Coordinate:
    """Place numbers on a linear axis (logarithmic if they span a decade), and all other values in equal steps.

    An infinite or NaN number gets no place among finite ones.
    """
    if all(map(_is_number, values)) and any(map(math.isfinite, values)):
        numbers = sorted({float(value) for value in values if math.isfinite(value)})
        places = [_between(float(value), numbers) if math.isfinite(value) else math.nan for value in values]
        labels = [(_between(number, numbers), f"{number:.3g}") for number in numbers]
        return Coordinate(name + (" (log)" if _is_log(numbers) else ""), places, _apart(labels))
    words = sorted(set(map(_written, values)))
    steps = {word: index / max(1, len(words) - 1) for index, word in enumerate(words)}
    labels = [(place, short_name(word, 12)) for word, place in steps.items()]
    return Coordinate(name, [steps[_written(value)] for value in values], labels)


def _draw_coordinates(axes: Axes, coordinates: Sequence[Coordinate]) -> None:
    halo = [withStroke(linewidth=2.5, foreground="white")]  # keeps numbers readable where lines cross them
    for index, one in enumerate(coordinates):
        axes.plot([index, index], [0, 1], color=FAINT, linewidth=1.2, zorder=0.5, gid=f"axis-{index}")
        for place, text in one.labels:
            axes.text(index + 0.06, place, text, fontsize=7.5, va="center", color=INK, path_effects=halo, zorder=4)
    names = [textwrap.fill(short_name(one.name, 40), 10) for one in coordinates]
    axes.set_xticks(range(len(coordinates)), names, fontsize=8)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_xlim(-0.2, len(coordinates) - 0.4)
    axes.set_ylim(-0.05, 1.05)


def _is_number(value: Any) -> bool:
    if isinstance(value, int):  # a YAML file may hold an integer of hundreds of digits
        return not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, float)


def _is_log(ascending: Sequence[float]) -> bool:
    return ascending[0] > 0 and ascending[-1] >= DECADE * ascending[0]


def _between(value: float, ascending: Sequence[float]) -> float:
    """Return the position of a value between the first and the last, 0 to 1; 0.5 if these are equal."""
    of = math.log if _is_log(ascending) else float
    low, high = of(ascending[0]), of(ascending[-1])
    return 0.5 if low == high else (of(value) - low) / (high - low)


def _apart(labels: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Drop the labels that would overlap another; the first and the last always stay."""
    kept = [labels[0]]
    for place, text in labels[1:-1]:
        if min(place - kept[-1][0], 1 - place) >= LABEL_GAP:
            kept.append((place, text))
    return [*kept, labels[-1]] if len(labels) > 1 else kept


def _written(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if _is_number(value) else str(value)
