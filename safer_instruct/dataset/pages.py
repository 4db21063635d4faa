"""Render the pages of a dataset and of an audit: the main answers first, then tables and figures; never the texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safer_instruct.dataset.tables import (
    drop_table,
    found_table,
    label_table,
    review_tables,
    shortcut_table,
    word_table,
)
from safer_instruct.report.dataset import funnel
from safer_instruct.report.html import Answer, Bar, Section, render
from safer_instruct.report.plots import Plot
from safer_instruct.text.display import percent

MAX_BARS = 10  # per answer


def render_audit_page(report: Mapping[str, Any], figures: Sequence[Plot]) -> str:
    """Render `audit.html` from the report of `audit.audit` and the figures."""
    reviews = review_tables(report.get("reviews"))
    sections = [
        Section(
            "By label", f"{len(report['by_label'])} labels", tables=[found_table(report)], plots=figures, shown=True
        ),
        *[Section(table.title, f"{len(table.rows)} rows", tables=[table], shown=True) for table in reviews],
        Section("Shortcuts, by label", "AUC of shallow features", tables=[shortcut_table(report)]),
        Section("Lengths", "words of each column", tables=[word_table(report)]),
    ]
    clean = report["rows"] - sum(report["total"][name] for name in report["findings"])
    lead = f"{report['rows']:,} rows, {report['total']['answered']:,} of them with an answer instead of a refusal."
    return render(
        "summary.html",
        kicker="audit",
        title=report["path"],
        lead=lead,
        answers=[_clean(report, clean), _told_apart(report), _checked(report.get("reviews"))],
        sections=sections,
    )


def _clean(report: Mapping[str, Any], clean: int) -> Answer:
    bars = []
    for label, counts in list(report["by_label"].items())[:MAX_BARS]:
        found = min(counts["rows"], sum(counts[name] for name in report["findings"]))
        share = 1 - found / counts["rows"]
        bars.append(Bar(label, share, None, None, percent(share)))
    share = max(0, clean) / max(1, report["rows"])
    words = f"of {report['rows']:,} rows repeat no other row and no prompt of the test set"
    return Answer("Is it clean?", f"{percent(share)}%", "counted, not estimated", words, bars)


def _told_apart(report: Mapping[str, Any]) -> Answer:
    means = {name.replace("_", " "): of[""] for name, of in report["shortcuts"].items()}
    bars = [
        Bar(name, one["value"], one["low"], one["high"], "-" if one["value"] is None else f"{one['value']:.2f}")
        for name, one in means.items()
    ]
    known = {name: one for name, one in means.items() if one["value"] is not None}
    question = "Can a model cheat?"
    if not known:
        return Answer(question, "-", "", "no pair has both responses, so there is nothing to tell apart", bars)
    name = max(known, key=lambda name: abs(known[name]["value"] - 0.5))
    one = known[name]
    words = f"AUC: how well {name} alone tells chosen from rejected; 0.5: not at all, 0 or 1: perfectly"
    interval = f"95% interval {one['low']:.2f} to {one['high']:.2f}"
    return Answer(question, f"{one['value']:.2f}", interval, words, bars, ("0", "0.5", "1"))


def _checked(reviews: Mapping[str, Any] | None) -> Answer:
    question = "Is it right?"
    if reviews is None:
        return Answer(question, "not known", "", "nobody has looked at its pairs: induce.py stage=review draws a page")
    precision = reviews["total"]["precision"]
    bars = [
        Bar(label, one["precision"]["value"], one["precision"]["low"], one["precision"]["high"],
            percent(one["precision"]["value"]))
        for label, one in list(reviews["by_label"].items())[:MAX_BARS]
    ]  # fmt: skip
    words = f"of the pairs are right, by {len(reviews['reviewers'])} reviewer(s) who saw {precision['n']:,} of them"
    if precision["value"] is None:
        return Answer(question, "not known", "", "nobody decided on a pair with its safe response", bars)
    interval = f"95% interval {percent(precision['low'])} to {percent(precision['high'])}"
    return Answer(question, f"{percent(precision['value'])}%", interval, words, bars)


def render_dataset_page(report: Mapping[str, Any], figure: Plot) -> str:
    """Render `dataset.html`, the page next to the card, from `card.build_report` and the figure of its rows."""
    labels = dict(sorted(report["by_label"].items(), key=lambda item: -item[1]["induced"]))
    drops = drop_table(report)
    sections = [
        Section("From the corpus to the dataset", "the funnel", steps=funnel(report), shown=True),
        Section("By label", f"{len(labels)} labels", tables=[label_table(report)], plots=[figure]),
    ]
    if drops.rows:
        sections.append(Section(drops.title, f"{len(drops.rows)} reasons", tables=[drops]))
    corpus = report["funnel"][0]["in"]
    return render(
        "summary.html",
        kicker="dataset",
        title="A preference dataset",
        lead=f"{report['num_rows']:,} pairs, made from {corpus:,} unsafe responses by reversed instruction tuning.",
        answers=list(_dataset_answers(report, labels)),
        sections=sections,
        made=[(key.replace("_", " "), str(value)) for key, value in {**report["made_with"], **report["run"]}.items()],
    )


def _dataset_answers(report: Mapping[str, Any], labels: Mapping[str, Mapping[str, Any]]) -> Iterator[Answer]:
    shown = list(labels.items())[:MAX_BARS]
    largest = max((one["out"] for one in labels.values()), default=0) or 1
    bars = [Bar(label, one["out"] / largest, None, None, f"{one['out']:,}") for label, one in shown]
    words = f"in the dataset, under {len(labels)} labels"
    yield Answer("How much is there?", f"{report['num_rows']:,} pairs", "", words, bars, ("0", "", f"{largest:,}"))
    bars = [Bar(label, one["kept_rate"], None, None, percent(one["kept_rate"])) for label, one in shown]
    kept = report["kept_rate"]
    value = "-" if kept is None else f"{percent(kept)}%"
    yield Answer("How strict was the expert?", value, "", "of the induced pairs were kept by the filter", bars)
    checked = report["reviewed"]
    question, nobody = "Has anybody checked?", "nobody has looked at its pairs: induce.py stage=review draws a page"
    if not checked["reviewers"]:
        yield Answer(question, "not yet", "", nobody)
        return
    words = f"checked by {checked['reviewers']} reviewer(s); the pairs that they rejected are left out"
    yield Answer(question, f"{checked['pairs']:,} pairs", f"{checked['rejected']:,} rejected", words)
