"""Build the tables of a dataset's report and of an audit, shared by Markdown and the pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from safer_instruct.report.tables import Table, interval_text
from safer_instruct.text.display import percent


def funnel_table(report: Mapping[str, Any]) -> Table:
    """Build the table of rows that came through each stage."""
    rows = [[one["stage"], str(one["in"]), str(one["out"]), _share(one["rate"])] for one in report["funnel"]]
    return Table("How many rows came through", ["stage", "rows in", "rows out", "share"], rows)


def label_table(report: Mapping[str, Any]) -> Table:
    """Build the table of what became of each label's rows, the label with the most rows first."""
    labels = sorted(report["by_label"].items(), key=lambda item: -item[1]["induced"])
    rows = [
        [label, *(str(one[key]) for key in ("induced", "kept", "out")), _share(one["rate"])] for label, one in labels
    ]
    header = ["label", "induced", "kept by the filter", "in the dataset", "share"]
    return Table("By label", header, rows, "Share: the part of the induced pairs that is in the dataset.")


def drop_table(report: Mapping[str, Any]) -> Table:
    """Build the table of reasons for drops, by stage, the most frequent reason first."""
    rows = [
        [stage["stage"], reason, str(number)]
        for stage in report["funnel"]
        for reason, number in sorted(stage["drops"].items(), key=lambda item: -item[1])
    ]
    return Table("Why rows were dropped", ["dropped by", "reason", "rows"], rows, left=(0, 1))


def _share(rate: float | None) -> str:
    return "-" if rate is None else f"{percent(rate)}%"


def found_table(report: Mapping[str, Any]) -> Table:
    """Build the table of what an audit found in the rows of each label, and in all rows."""
    names = list(report["total"])
    labels = [*report["by_label"].items(), ("all", report["total"])]
    rows = [[label, *(str(counts[name]) for name in names)] for label, counts in labels]
    return Table("Found, by label", ["label", *(name.replace("_", " ") for name in names)], rows)


def word_table(report: Mapping[str, Any]) -> Table:
    """Build the table of text lengths in each column."""
    rows = [[column, *map(str, values.values())] for column, values in report["words"].items()]
    header = ["column", "mean", "median", "95%", "most"]
    return Table("Words of the non-empty texts in each column", header, rows)


def interval(one: Mapping[str, Any] | None) -> str:
    """Format a number with its interval, such as `0.52 [0.48, 0.56]`; `-` if there is none."""
    if one is None or one["value"] is None:
        return "-"
    return f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def shortcut_table(report: Mapping[str, Any]) -> Table:
    """Build the table of the AUC of each shallow feature, a row per label."""
    found = report["shortcuts"]
    rows = []
    for label in next(iter(found.values())):
        cells = [of[label] for of in found.values()]
        rows.append([label or "all", str(cells[0]["n"]), *map(interval, cells)])
    header = ["label", "pairs", *(name.replace("_", " ") for name in found)]
    caption = (
        "How well shallow features tell chosen from rejected: AUC with 95% interval (0.5: not at all, 0 or 1: fully)."
    )
    return Table("Shortcuts, by label", header, rows, caption)


def review_tables(found: Mapping[str, Any] | None) -> Iterator[Table]:
    """Yield the tables of people's decisions, if there are any: precision by label, and pairwise agreement."""
    if found is None:
        return
    rows = []
    for label, one in [*found["by_label"].items(), ("all", found["total"])]:
        precision = one["precision"]
        text = interval_text(precision["value"], precision["low"], precision["high"])
        counts = [str(one[key]) for key in ("rows", "reviewed", "kept", "wrong_instruction", "unsafe_answer")]
        rows.append([label, *counts, text])
    names = ", ".join(found["reviewers"])
    yield Table(
        "Precision, by people",
        ["label", "rows", "reviewed", "kept", "wrong instruction", "unsafe answer", "precision"],
        rows,
        f"Reviewed by {names}. Precision: pairs that fewer than half of their reviewers reject, in per cent with 95% "
        "Wilson intervals; the total weights labels by their rows. Faults are counted per decision, not per pair.",
    )
    rows = []
    for pair in found["agreement"]:
        for label, one in [("all", pair), *pair["by_label"].items()]:
            counts = [str(one["n"]), str(one["agreed"])]
            rows.append([f"{pair['first']}, {pair['second']}", label, *counts, interval(one["kappa"])])
    yield Table(
        "Agreement",
        ["who", "label", "pairs", "agreed", "kappa"],
        rows,
        "Cohen's kappa with its 95% interval over the pairs that both decided on, not weighted by label; - if it is "
        "undefined (one of them always decides the same). With the expert: whether the instruction is right, which is "
        "what its filter judges; pairs that it dropped are included if review.dropped was set.",
        left=(0, 1),
    )
