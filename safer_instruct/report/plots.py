"""The figures of a report, as SVG text: bars with intervals, the mix of outcomes, training curves.

Colours are Okabe and Ito's, which readers with any of the common colour vision deficiencies can tell apart; nothing is
told by colour alone. Figures are drawn narrow, so that their text stays readable when a phone scales them down.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from safer_instruct.text.display import percent, short_name

MODEL_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
# Key of `outcome_shares`, words of the legend, colour.
OUTCOME_STYLES = (
    ("harmful", "harmful", "#D55E00"),
    ("neither", "neither", "#C9CCD1"),
    ("safe_helpful", "safe and helpful", "#009E73"),
    ("refusal_vague", "refusal", "#56B4E9"),
    ("refusal_specific", "refusal that names the matter", "#0072B2"),
)
WIDTH_INCHES = 4.7
INK, FAINT = "#20242A", "#D9DDE3"
# Names come from files and from the command line: without this a "$" in one would be read as mathematics.
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "safer-instruct",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure: a heading, what it shows in words, and the drawing."""

    title: str
    alt: str
    svg: str


def plot_rates(title: str, metric: str, models: Mapping[str, Mapping[str, Any]], group: str) -> Plot | None:
    """Bars of one metric with 95% intervals: one cluster for each label (or source), one bar for each model.

    Args:
        title: Heading of the figure.
        metric: Key of a rate in the report, `harmful_rate`.
        models: `report["models"]`.
        group: `by_label`, `by_source` or `by_set`.

    Returns:
        The figure; None if no model has the metric in any group.
    """
    names = sorted({name for model in models.values() for name, rates in model[group].items() if metric in rates})
    if not names:
        return None
    with matplotlib.rc_context(STYLE):
        height = 0.75 + len(names) * (0.17 * len(models) + 0.16)
        figure, axes = _new_figure(height)
        bar = 0.82 / len(models)
        for index, (model_name, model) in enumerate(models.items()):
            of_group = {name: rates[metric] for name, rates in model[group].items() if metric in rates}
            rows = [(row, of_group[name]) for row, name in enumerate(names) if name in of_group]
            offset = (index - (len(models) - 1) / 2) * bar
            values = [rate["value"] for _, rate in rows]
            axes.barh(
                [row + offset for row, _ in rows],
                values,
                height=bar * 0.88,
                color=MODEL_COLORS[index % len(MODEL_COLORS)],
                label=short_name(model_name),
                # max: an interval's end may differ from the value by one rounding error
                xerr=[
                    [max(0.0, rate["value"] - rate["low"]) for _, rate in rows],
                    [max(0.0, rate["high"] - rate["value"]) for _, rate in rows],
                ],
                error_kw={"elinewidth": 1.0, "ecolor": INK, "capsize": 1.8},
            )
        axes.set_yticks(range(len(names)), [short_name(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.03)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        _legend(axes, len(models))
        svg = _to_svg(figure)
    described = "; ".join(
        f"{short_name(name, 60)}: {_describe(model[group], metric)}" for name, model in models.items()
    )
    return Plot(title, f"{title}, bars with 95% intervals. {described}.", svg)


def _describe(groups: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """`dare 94.1%, theft 92.0%`: a figure's numbers for its alternative text."""
    return ", ".join(
        f"{short_name(name, 60)} {percent(rates[metric]['value'])}%"
        for name, rates in sorted(groups.items())
        if metric in rates
    )


def outcome_shares(model: Mapping[str, Any]) -> dict[str, float] | None:
    """The judged answers to unsafe prompts as shares that sum to 1, in the order of `OUTCOME_STYLES`.

    A judge that does not tell which refusals name the matter leaves all of them in `refusal_vague`, and one that does
    not tell which answers help leaves them in `neither`.
    None without a judged unsafe prompt.
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


def plot_outcomes(models: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """What each model does with an unsafe prompt: one bar of shares a model. None if there are no unsafe prompts."""
    shares = {name: outcome for name, model in models.items() if (outcome := outcome_shares(model)) is not None}
    if not shares:
        return None
    title = "What becomes of an unsafe request"
    helps = any(outcome["safe_helpful"] for outcome in shares.values())
    styles = [style for style in OUTCOME_STYLES if helps or style[0] != "safe_helpful"]
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(0.95 + 0.36 * len(shares))
        starts = [0.0] * len(shares)
        for key, words, color in styles:
            widths = [outcome[key] for outcome in shares.values()]
            axes.barh(range(len(shares)), widths, left=starts, color=color, height=0.66, label=words, edgecolor="white")
            for row, (start, width) in enumerate(zip(starts, widths, strict=True)):
                if width >= 0.08:
                    ink = "white" if key in ("harmful", "refusal_specific", "safe_helpful") else INK
                    where: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5}
                    axes.text(start + width / 2, row, f"{100 * width:.0f}", color=ink, **where)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        axes.set_yticks(range(len(shares)), [short_name(name) for name in shares])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(visible=False)
        _legend(axes, 2)
        svg = _to_svg(figure)
    described = "; ".join(
        f"{name}: " + ", ".join(f"{words} {percent(outcome[key])}%" for key, words, _ in styles)
        for name, outcome in shares.items()
    )
    return Plot(title, f"{title}, shares of the judged answers. {described}.", svg)


def plot_curves(title: str, unit: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Plot | None:
    """Lines over examples seen. None where no curve has a point.

    Args:
        title: Heading of the figure.
        unit: What the y-axis shows, "nats".
        curves: For each line its points (examples seen, value), ascending.
    """
    drawn = {name: points for name, points in curves.items() if points}
    if not drawn:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(2.5)
        for index, (name, points) in enumerate(drawn.items()):
            # Held-out points are few: dots show where they were measured.
            axes.plot(
                *zip(*points, strict=True),
                color=MODEL_COLORS[index % len(MODEL_COLORS)],
                linewidth=1.5,
                marker="o" if len(points) <= 25 else None,
                markersize=3,
                linestyle=("-", "--", ":", "-.")[index % 4],
                label=short_name(name, 30),
            )
        axes.set_xlabel("examples seen")
        axes.set_ylabel(unit)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.grid(visible=False, axis="x")
        axes.margins(x=0.02)
        _legend(axes, 2)
        svg = _to_svg(figure)
    described = "; ".join(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" for name, points in drawn.items())
    return Plot(title, f"{title}, over examples seen. {described}.", svg)


def _new_figure(height_inches: float) -> tuple[Figure, Axes]:
    """A figure of our own, outside pyplot: no global state, nothing to close, no display needed."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    return figure, axes


def _legend(axes: Axes, num_columns: int) -> None:
    axes.figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=min(num_columns, 3),
        frameon=False,
        fontsize=8.5,
        handlelength=1.4,
        columnspacing=1.2,
        borderpad=0.0,
    )


def _to_svg(figure: Figure) -> str:
    """The drawing without the date and the XML head, so that equal numbers give equal bytes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
