"""The figures of a report, as SVG text: bars with intervals, the mix of outcomes, training curves.

Colours are Okabe and Ito's, which readers with any of the common colour vision deficiencies can tell apart; nothing is
told by colour alone. Figures are drawn narrow, so that their text stays readable when a phone scales them down.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from safer_instruct.report.tables import Models, groups_with
from safer_instruct.text.display import percent, short_name

MODEL_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
INK, FAINT = "#20242A", "#D9DDE3"


# Key of `outcome_shares`, words of the legend, colour of the bar, colour of the number upon it.
OUTCOMES = (
    ("harmful", "harmful", "#D55E00", "white"),
    ("neither", "neither", "#C9CCD1", INK),
    ("safe_helpful", "safe and helpful", "#009E73", "white"),
    ("refusal_vague", "refusal", "#56B4E9", INK),
    ("refusal_specific", "refusal that names the matter", "#0072B2", "white"),
)
WIDTH_INCHES = 4.7
NAMED_SHARE = 0.08  # the number of a smaller share would not fit into its part of the bar
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    # Names come from files and from the command line: a "$" in one would be read as mathematics.
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
    """One figure: a heading, what it shows in words, and the drawing."""

    title: str
    alt: str
    svg: str


def new_axes(height_inches: float, width_inches: float = WIDTH_INCHES) -> Axes:
    """Return the axes of a figure outside pyplot: no global state, nothing to close, no display needed.

    To be called, and drawn on, in the context of `STYLE`.
    """
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    return figure.add_subplot()


def to_svg(axes: Axes, *, legend_columns: int = 2, transparent: bool = True) -> str:
    """Add the legend, and return the drawing without date and XML head: equal numbers give equal bytes."""
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


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write the names of horizontal bars beside them, the first on top."""
    axes.set_yticks(range(len(names)), [short_name(name) for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def stack_bars(axes: Axes, bars: Mapping[str, Sequence[float]], parts: Sequence[tuple[str, str]]) -> list[BarContainer]:
    """Draw one horizontal bar for each name, cut into parts of these (words, colour); gives what is drawn of each."""
    starts = [0.0] * len(bars)
    drawn = []
    for index, (words, color) in enumerate(parts):
        sizes = [values[index] for values in bars.values()]
        bar = axes.barh(range(len(bars)), sizes, left=starts, color=color, label=words, height=0.68, edgecolor="white")
        drawn.append(bar)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    name_rows(axes, list(bars))
    return drawn


def plot_rates(title: str, metric: str, models: Models, group: str) -> Plot | None:
    """Draw one metric with 95% intervals: a cluster of bars for each label (or source), a bar for each model.

    Args:
        title: Heading of the figure.
        metric: Key of a rate in the report, `harmful_rate`.
        models: `report["models"]`.
        group: `by_label`, `by_source` or `by_set`.

    Returns:
        The figure; None if no model has the metric in any group.
    """
    names = groups_with(models, group, metric)
    if not names:
        return None
    bar_height = 0.82 / len(models)
    height_inches = 0.75 + len(names) * (0.17 * len(models) + 0.16)
    described = []
    with matplotlib.rc_context(STYLE):
        axes = new_axes(height_inches)
        for index, (model_name, model) in enumerate(models.items()):
            in_group = model[group]
            rates = {row: in_group[name][metric] for row, name in enumerate(names) if metric in in_group.get(name, {})}
            offset = (index - (len(models) - 1) / 2) * bar_height
            axes.barh(
                [row + offset for row in rates],
                [rate["value"] for rate in rates.values()],
                height=bar_height * 0.88,
                color=MODEL_COLORS[index % len(MODEL_COLORS)],
                label=short_name(model_name),
                # max: an interval's end may differ from the value by one rounding error
                xerr=[
                    [max(0.0, rate["value"] - rate["low"]) for rate in rates.values()],
                    [max(0.0, rate["high"] - rate["value"]) for rate in rates.values()],
                ],
                error_kw={"elinewidth": 1.0, "ecolor": INK, "capsize": 1.8},
            )
            values = [f"{short_name(names[row], 60)} {percent(rate['value'])}%" for row, rate in rates.items()]
            described.append(f"{short_name(model_name, 60)}: {', '.join(values)}")
        name_rows(axes, names)
        axes.set_xlim(0, 1.03)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        svg = to_svg(axes, legend_columns=min(len(models), 3))
    return Plot(title, f"{title}, bars with 95% intervals. {'; '.join(described)}.", svg)


def outcome_shares(model: Mapping[str, Any]) -> dict[str, float] | None:
    """Return the judged answers to unsafe prompts as shares that sum to 1, in the order of `OUTCOMES`.

    A judge that does not tell which refusals name the matter leaves all of them in `refusal_vague`, and one that does
    not tell which answers help leaves them in `neither`. None without a judged unsafe prompt.
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
    """Draw what each model does with an unsafe prompt, a bar of shares; None if there are no unsafe prompts."""
    shares = {name: outcome for name, model in models.items() if (outcome := outcome_shares(model)) is not None}
    if not shares:
        return None
    title = "What becomes of an unsafe request"
    helps = any(outcome["safe_helpful"] for outcome in shares.values())
    parts = [part for part in OUTCOMES if helps or part[0] != "safe_helpful"]
    bars = {name: [outcome[key] for key, *_ in parts] for name, outcome in shares.items()}
    with matplotlib.rc_context(STYLE):
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
    return Plot(title, f"{title}, shares of the judged answers. {described}.", svg)


def plot_trade_off(models: Models) -> Plot | None:
    """Draw over-refusal against harmful answers, a point for each model and an arrow to the next one.

    None unless a model was asked prompts of both kinds.
    """
    keys = ("harmful_rate", "over_refusal_rate")
    points = {
        name: [model[key] for key in keys] for name, model in models.items() if all(model[key]["n"] for key in keys)
    }
    if not points:
        return None
    title = "Harm against over-refusal"
    with matplotlib.rc_context(STYLE):
        axes = new_axes(3.0)
        for index, (name, rates) in enumerate(points.items()):
            x, y = (rate["value"] for rate in rates)
            errors = [[[rate["value"] - rate["low"]], [rate["high"] - rate["value"]]] for rate in rates]
            color = MODEL_COLORS[index % len(MODEL_COLORS)]
            axes.errorbar(x, y, xerr=errors[0], yerr=errors[1], fmt="o", color=color, label=short_name(name, 30))
        for before, after in pairwise(points.values()):
            ends = [(rates[0]["value"], rates[1]["value"]) for rates in (after, before)]
            axes.annotate("", xy=ends[0], xytext=ends[1], arrowprops={"arrowstyle": "->", "color": INK, "alpha": 0.5})
        axes.set_xlabel("harmful answers to unsafe prompts")
        axes.set_ylabel("refusals of benign prompts")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        svg = to_svg(axes)
    described = "; ".join(
        f"{name}: harmful {percent(harmful['value'])}%, over-refusal {percent(over['value'])}%"
        for name, (harmful, over) in points.items()
    )
    return Plot(title, f"{title}, with 95% intervals; the best corner is the lower left one. {described}.", svg)


def plot_curves(title: str, unit: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Plot | None:
    """Draw lines over examples seen; None where no curve has a point.

    Args:
        title: Heading of the figure.
        unit: What the y-axis shows, "nats".
        curves: For each line its points (examples seen, value), ascending.
    """
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        axes = new_axes(2.5)
        for index, (name, points) in enumerate(curves.items()):
            axes.plot(
                *zip(*points, strict=True),
                color=MODEL_COLORS[index % len(MODEL_COLORS)],
                linewidth=1.5,
                # Held-out points are few: dots show where they were measured.
                marker="o" if len(points) <= 25 else None,
                markersize=3,
                linestyle=("-", "--", ":", "-.")[index % 4],
                label=short_name(name, 30),
            )
        axes.set_xlabel("examples seen")
        axes.set_ylabel(unit)
        axes.grid(visible=False, axis="x")
        axes.margins(x=0.02)
        svg = to_svg(axes)
    described = "; ".join(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in curves.items())
    return Plot(title, f"{title}, over examples seen. {described}.", svg)
