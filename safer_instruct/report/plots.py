"""Draw the figures of a report as SVG text: rates with intervals, shares of outcomes, safety against over-refusal.

Models have Okabe and Ito's colours and outcomes ColorBrewer's BrBG: readers with the common colour vision deficiencies
can tell them apart, and the two sets from each other. Each model also has its own marker. Figures are narrow, so that
their text stays readable when a phone scales them down.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from safer_instruct.report.tables import NOT_COUNTED, Models, groups_with
from safer_instruct.text.display import percent, short_name

MODEL_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#A89B00", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
INK, FAINT = "#20242A", "#D9DDE3"


# Key of `outcome_shares`, legend, colour of the bar, colour of the number on it.
OUTCOMES = (
    ("harmful", "harmful", "#8C510A", "white"),
    ("neither", "neither", "#D3D6DB", INK),
    ("safe_helpful", "safe and helpful", "#C7EAE5", INK),
    ("refusal_vague", "refusal", "#80CDC1", INK),
    ("refusal_specific", "refusal that names the matter", "#01665E", "white"),
)
WIDTH_INCHES = 4.7
NAMED_SHARE = 0.08  # smaller shares get no number, as it would not fit into their part of the bar
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    # Off, because names come from files and the command line, and a "$" in one would start mathematics.
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "path",
    "svg.hashsalt": "safer-instruct",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure: its heading, a text alternative, the drawing, and how to read it."""

    title: str
    alt: str
    svg: str
    caption: str = ""


def styled() -> AbstractContextManager[None]:
    """Return the context in which axes are made and drawn on."""
    return matplotlib.rc_context(STYLE)


def new_axes(height_inches: float, width_inches: float = WIDTH_INCHES) -> Axes:
    """Return the axes of a figure made without pyplot: no global state, nothing to close, no display needed.

    Call this, and draw on the axes, in the context of `styled`.
    """
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    return figure.add_subplot()


def to_svg(axes: Axes, *, legend_columns: int = 2, transparent: bool = True) -> str:
    """Add the legend, and return the SVG without its date and XML header, so that equal numbers give equal bytes."""
    figure = axes.get_figure(root=True)
    assert figure is not None  # `new_axes` made it
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=legend_columns,
        frameon=False,
        fontsize=8.5,
        handlelength=1.4,
        columnspacing=1.2,
        borderpad=0.0,
    )
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=transparent)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def name_rows(axes: Axes, names: Sequence[str], *, cut: bool = True) -> None:
    """Label the rows with names, the first on top; `cut` shortens long names."""
    axes.set_yticks(range(len(names)), [short_name(name) if cut else name for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def stack_bars(axes: Axes, bars: Mapping[str, Sequence[float]], parts: Sequence[tuple[str, str]]) -> list[BarContainer]:
    """Draw one stacked horizontal bar per name; return the drawn bars of each part, given as (legend, colour).

    A part that is empty in all bars gets no legend entry.
    """
    starts = [0.0] * len(bars)
    drawn = []
    for index, (words, color) in enumerate(parts):
        sizes = [values[index] for values in bars.values()]
        label = words if any(sizes) else "_"  # matplotlib leaves "_" out of the legend
        bar = axes.barh(range(len(bars)), sizes, left=starts, color=color, label=label, height=0.68, edgecolor="white")
        drawn.append(bar)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    name_rows(axes, list(bars))
    return drawn


def plot_rates(title: str, metric: str, models: Models, group: str) -> Plot | None:
    """Draw one metric with 95% intervals: a row for each label (or source), with a point for each model.

    `metric` is the key of a rate in the report (`harmful_rate`); `group` is `by_label`, `by_source` or `by_set`.
    Returns None if no model has the metric in any group.
    """
    names = groups_with(models, group, metric)
    if not names:
        return None
    spread = 0.7 / len(models)
    sizes: list[set[int]] = [set() for _ in names]
    described = []
    with styled():
        axes = new_axes(0.95 + len(names) * (0.14 * len(models) + 0.14))
        for index, (model_name, model) in enumerate(models.items()):
            in_group = model[group]
            rates = {row: in_group[name][metric] for row, name in enumerate(names) if metric in in_group.get(name, {})}
            for row, rate in rates.items():
                sizes[row].add(rate["n"])
            axes.errorbar(
                [rate["value"] for rate in rates.values()],
                [row + (index - (len(models) - 1) / 2) * spread for row in rates],
                xerr=whiskers(list(rates.values())),
                **_point(index),
                label=short_name(model_name),
            )
            values = [f"{short_name(names[row], 60)} {percent(rate['value'])}%" for row, rate in rates.items()]
            described.append(f"{short_name(model_name, 60)}: {', '.join(values)}")
        name_rows(
            axes, [f"{short_name(name)} ({_range(of)})" for name, of in zip(names, sizes, strict=True)], cut=False
        )
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("share of the answers")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        svg = to_svg(axes, legend_columns=min(len(models), 3))
    caption = "Points: share; whiskers: 95% Wilson interval; in brackets n, the answers that were counted."
    return Plot(title, f"{title}, with 95% intervals. {'; '.join(described)}.", svg, caption)


def _range(sizes: Iterable[int]) -> str:
    low, high = min(sizes), max(sizes)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def whiskers(rates: Sequence[Mapping[str, float]]) -> list[list[float]]:
    """Return how far the intervals reach below and above the values; clamped at 0, since ends have rounding errors."""
    return [
        [max(0.0, rate["value"] - rate["low"]) for rate in rates],
        [max(0.0, rate["high"] - rate["value"]) for rate in rates],
    ]


def _end(highs: Iterable[float]) -> float:
    """Return the end of an axis of shares, so that the whiskers fill it."""
    return min(1.0, max(0.2, 1.15 * max(highs)))


def _point(index: int) -> dict[str, Any]:
    """Return the style of the points of model number `index`."""
    marker, color = MARKERS[index % len(MARKERS)], MODEL_COLORS[index % len(MODEL_COLORS)]
    return {"fmt": marker, "color": color, "markersize": 4.5, "elinewidth": 1.2, "capsize": 1.8}


def outcome_shares(model: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the judged answers to unsafe prompts as shares that sum to 1, in the order of `OUTCOMES`.

    If the judge does not report which refusals name the matter, all are in `refusal_vague`; if it does not report
    which answers help, all are in `neither`. Returns None without a judged unsafe prompt.
    """
    if model["refusal_rate"]["n"] == 0:
        return None
    refusal = model["refusal_rate"]["value"]
    specific = model["specific_refusal_rate"]["value"] or 0.0
    return {
        "harmful": model["harmful_rate"]["value"],
        "neither": model["neither_rate"]["value"],
        "safe_helpful": model["safe_helpful_rate"]["value"] or 0.0,
        "refusal_vague": max(0.0, refusal - specific),
        "refusal_specific": specific,
    }


def plot_outcomes(models: Models) -> Plot | None:
    """Draw each model's outcomes on unsafe prompts as a bar of shares; None if there are no unsafe prompts."""
    shares = {name: outcome for name, model in models.items() if (outcome := outcome_shares(model)) is not None}
    if not shares:
        return None
    title = "What becomes of an unsafe request"
    helps = any(outcome["safe_helpful"] for outcome in shares.values())
    parts = [part for part in OUTCOMES if helps or part[0] != "safe_helpful"]
    bars = {name: [outcome[key] for key, *_ in parts] for name, outcome in shares.items()}
    with styled():
        axes = new_axes(0.95 + 0.36 * len(bars))
        drawn = stack_bars(axes, bars, [(words, color) for _, words, color, _ in parts])
        for (key, _, _, ink), bar in zip(parts, drawn, strict=True):
            sizes = [outcome[key] for outcome in shares.values()]
            numbers = [f"{100 * share:.0f}" if share >= NAMED_SHARE else "" for share in sizes]
            axes.bar_label(bar, numbers, label_type="center", color=ink, fontsize=8.5)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(visible=False)
        svg = to_svg(axes)
    described = "; ".join(
        f"{name}: " + ", ".join(f"{words} {percent(outcome[key])}%" for key, words, *_ in parts)
        for name, outcome in shares.items()
    )
    n = _range({models[name]["refusal_rate"]["n"] for name in shares})
    caption = f"Shares of the judged answers to unsafe prompts, per cent; n = {n} for each model."
    return Plot(title, f"{title}, shares of the judged answers. {described}.", svg, caption)


def plot_trade_off(models: Models) -> Plot | None:
    """Draw over-refusal against 1 - `safety`: a point for each model, and an arrow to the next one.

    The x-axis is not the harmful rate: a judge that looks for phrases finds no harm in most answers of a small model,
    so a model that stops declining would look as safe as before. None unless a model was asked prompts of both kinds.
    """
    keys = ("safety", "over_refusal_rate")
    points = {
        name: [_complement(model["safety"]), model["over_refusal_rate"]]
        for name, model in models.items()
        if all(model.get(key, NOT_COUNTED)["n"] for key in keys)
    }
    if not points:
        return None
    title = "Safety against over-refusal"
    with styled():
        axes = new_axes(3.0)
        for index, (name, rates) in enumerate(points.items()):
            x, y = (rate["value"] for rate in rates)
            across, up = (whiskers([rate]) for rate in rates)
            axes.errorbar(x, y, xerr=across, yerr=up, **_point(index), label=short_name(name, 30))
        for before, after in pairwise(points.values()):
            ends = [(rates[0]["value"], rates[1]["value"]) for rates in (after, before)]
            axes.annotate("", xy=ends[0], xytext=ends[1], arrowprops={"arrowstyle": "->", "color": INK, "alpha": 0.5})
        axes.locator_params(nbins=5)
        axes.set_xlabel("unsafe prompts neither declined nor helped safely")
        axes.set_ylabel("refusals of benign prompts")
        right, top = (_end(rates[part]["high"] for rates in points.values()) for part in (0, 1))
        axes.set_xlim(-0.03 * right, 1.03 * right)
        axes.set_ylim(-0.03 * top, 1.03 * top)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        svg = to_svg(axes)
    described = "; ".join(
        f"{name}: not answered safely {percent(unsafe['value'])}%, over-refusal {percent(over['value'])}%"
        for name, (unsafe, over) in points.items()
    )
    caption = (
        "Whiskers: 95% Wilson intervals; the best corner is the lower left one, the arrow leads to the next model."
    )
    return Plot(title, f"{title}, with 95% intervals. {described}.", svg, caption)


def _complement(rate: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": 1 - rate["value"], "low": 1 - rate["high"], "high": 1 - rate["low"], "n": rate["n"]}
