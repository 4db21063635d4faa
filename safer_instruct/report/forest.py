"""Draw the differences between two models as a forest plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safer_instruct.measures.comparisons import ALL_SOURCES
from safer_instruct.report.plots import INK, MODEL_COLORS, Plot, name_rows, new_axes, styled, to_svg
from safer_instruct.report.tables import METRIC_WORDS, last_pair, p_text, points
from safer_instruct.text.display import short_name

MAX_ROWS = 24


def plot_forest(entries: Sequence[Mapping[str, Any]]) -> Plot | None:
    """Draw the last two models' differences (`compare_models`) with 95% intervals, a row per rate; None without any."""
    rows = last_pair(entries)[:MAX_ROWS]
    if not rows:
        return None
    first, second = rows[0]["first"], rows[0]["second"]
    title = f"{short_name(second, 40)} against {short_name(first, 40)}"
    ends = [100 * abs(one[key]) for one in rows for key in ("difference", "low", "high") if one[key] is not None]
    limit = min(100.0, max(10.0, 1.1 * max(ends)))
    names = [METRIC_WORDS[one["metric"]] + _source(one) for one in rows]
    with styled():
        axes = new_axes(0.9 + 0.34 * len(rows))
        axes.axvline(0, color=INK, linewidth=0.8)
        for row, one in enumerate(rows):
            value = 100 * one["difference"]
            low, high = (value if one[end] is None else 100 * one[end] for end in ("low", "high"))
            filled = MODEL_COLORS[0] if one["p_holm"] < 0.05 else "white"
            axes.errorbar(
                value, row, xerr=[[max(0.0, value - low)], [max(0.0, high - value)]], fmt="o", color=MODEL_COLORS[0],
                markerfacecolor=filled, markersize=5.5, elinewidth=1.4, capsize=2,
            )  # fmt: skip
            axes.text(
                1.05 * limit, row, f"{points(one['difference'])}   p {p_text(one['p_holm'])}", va="center", fontsize=8
            )
        name_rows(axes, [f"{name} ({one['n']:,})" for name, one in zip(names, rows, strict=True)], cut=False)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-limit, limit)
        axes.set_xlabel("difference in percentage points")
        svg = to_svg(axes)
    described = "; ".join(f"{name} {points(one['difference'])}" for name, one in zip(names, rows, strict=True))
    caption = (
        "Second model minus the first, on the same prompts. Whiskers: 95% bootstrap interval (none if no prompt "
        "differs, or all differ alike); filled: significant at 0.05 after Holm's correction; in brackets n."
    )
    return Plot(title, f"{title}: differences in percentage points. {described}.", svg, caption)


def _source(one: Mapping[str, Any]) -> str:
    return "" if one["source"] == ALL_SOURCES else f", {short_name(one['source'])}"
