"""The figures of a dataset's card and of an audit, as SVG text: where the rows of each label went, what repeats.

Drawn as the figures of the reports are (`plots.py`): Okabe and Ito's colours, nothing told by colour alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from safer_instruct.report.plots import STYLE
from safer_instruct.text.display import short_name

# Words of the legend and colour of each part of a bar; what is in the dataset comes first.
FUNNEL_PARTS = (
    ("out", "in the dataset", "#0072B2"),
    ("filter", "dropped by the filter", "#E69F00"),
    ("respond", "no safe response", "#CC79A7"),
    ("merge", "repeated, excluded", "#999999"),
)
MAX_LABELS = 30  # of a figure: those with the most rows


def plot_funnel(report: Mapping[str, Any]) -> str:
    """One bar a label, cut by where its rows ended.

    Args:
        report: Of `card.build_report`.

    Returns:
        SVG.
    """
    labels = dict(sorted(report["by_label"].items(), key=lambda item: -item[1]["induced"])[:MAX_LABELS])
    bars = {
        label: [counts["out"] if part == "out" else counts["drops_by_stage"][part] for part, _, _ in FUNNEL_PARTS]
        for label, counts in labels.items()
    }
    return plot_parts(bars, [(words, color) for _, words, color in FUNNEL_PARTS], "rows")


def plot_parts(bars: Mapping[str, Sequence[int]], parts: Sequence[tuple[str, str]], unit: str) -> str:
    """Stacked horizontal bars.

    Args:
        bars: Name -> the sizes of its parts.
        parts: Words of the legend and colour of each part.
        unit: Of the axis.

    Returns:
        SVG.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.2 + 0.32 * max(1, len(bars))), layout="constrained")
        axes = figure.add_subplot()
        left = [0] * len(bars)
        for index, (words, color) in enumerate(parts):
            sizes = [values[index] for values in bars.values()]
            axes.barh(range(len(bars)), sizes, left=left, color=color, label=words, height=0.7)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        for row, (values, total) in enumerate(zip(bars.values(), left, strict=True)):
            axes.text(total, row, f" {values[0]} of {total}", va="center", fontsize=8)
        axes.set_yticks(range(len(bars)), [short_name(name) for name in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max([*left, 1]))
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
        return buffer.getvalue()
