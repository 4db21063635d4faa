"""Draw the figures of a dataset card and of an audit as SVG text: the fate of each label's rows, and repetitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safer_instruct.report.plots import Plot, new_axes, stack_bars, styled, to_svg

# Key, legend and colour; the rows in the dataset come first.
FUNNEL_PARTS = (
    ("out", "in the dataset", "#01665E"),
    ("filter", "dropped by the filter", "#DFC27D"),
    ("respond", "no safe response", "#8C510A"),
    ("merge", "repeated, excluded, rejected", "#999999"),
)
MAX_LABELS = 30  # per figure: those with the most rows


def plot_funnel(report: Mapping[str, Any]) -> Plot:
    """Draw one bar per label of the report of `card.build_report`, divided by where its rows ended up."""
    labels = dict(sorted(report["by_label"].items(), key=lambda item: -item[1]["induced"])[:MAX_LABELS])
    bars = {}
    for label, counts in labels.items():
        sizes = {"out": counts["out"], **counts["drops_by_stage"]}
        bars[label] = [sizes[key] for key, _, _ in FUNNEL_PARTS]
    title = "Where the rows of each label went"
    described = "; ".join(f"{label}: {sizes[0]} of {sum(sizes)} in the dataset" for label, sizes in bars.items())
    svg = plot_parts(bars, [(words, color) for _, words, color in FUNNEL_PARTS])
    return Plot(title, f"{title}. {described}.", svg)


def plot_parts(bars: Mapping[str, Sequence[int]], parts: Sequence[tuple[str, str]]) -> str:
    """Draw stacked horizontal bars of rows as SVG; each is labelled with the size of its first part and of the whole.

    Args:
        bars: Name -> the sizes of its parts.
        parts: Legend and colour of each part.
    """
    with styled():
        axes = new_axes(1.2 + 0.32 * max(1, len(bars)), width_inches=6.4)
        stack_bars(axes, bars, parts)
        for row, sizes in enumerate(bars.values()):
            axes.text(sum(sizes), row, f" {sizes[0]} of {sum(sizes)}", va="center", fontsize=8)
        axes.set_xlim(0, 1.2 * max([1, *map(sum, bars.values())]))
        axes.set_xlabel("rows")
        return to_svg(axes, transparent=False)  # opaque, because cards are also read on dark pages
