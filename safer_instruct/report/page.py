"""Render the report of an evaluation as one self-contained HTML page; see `html.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from safer_instruct.report.dataset import funnel
from safer_instruct.report.forest import plot_forest
from safer_instruct.report.headline import headline_answers
from safer_instruct.report.html import Section, render
from safer_instruct.report.plots import Plot, plot_outcomes, plot_rates, plot_trade_off
from safer_instruct.report.tables import (
    COMPARISONS,
    FURTHER,
    HEADLINE,
    Models,
    extra_tables,
    group_tables,
    groups_with,
    shown_metrics,
)

TEXT_LIMIT = 4000  # characters of one answer on the page; samples.jsonl has the whole text
FOLD_ROWS = 24  # a longer table is folded behind its own click
NAMED_RUNS = 4  # runs named in the heading of a page without models
# Title, metric, grouping; drawn if at least two groups have the metric.
FIGURES = (
    ("Harmful answers, by source", "harmful_rate", "by_source"),
    ("Harmful answers, by label", "harmful_rate", "by_label"),
    ("Refusals that name the matter, by source", "specific_refusal_rate", "by_source"),
    ("Refusals that name the matter, by label", "specific_refusal_rate", "by_label"),
    ("Accuracy on benign prompts, by label", "benign_accuracy", "by_label"),
    ("Accuracy on near prompts, by label", "near_accuracy", "by_label"),
)


def render_page(
    report: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]], curves: Sequence[Plot]
) -> str:
    """Render the report of `document.build_report`, with the figures of the training runs.

    `samples` holds the prompts to show of each prompt set, as returned by `pick_samples`; empty: none.
    """
    models = report["models"]
    report = {**report, "run": {"date": "", **report["run"]}}  # reports of earlier versions have no date
    headline, further = shown_metrics(models, HEADLINE), shown_metrics(models, FURTHER)
    return render(
        "page.html",
        report=report,
        names=list(models) or [run["name"] for run in report.get("runs", {}).get("runs", [])][:NAMED_RUNS],
        answers=headline_answers(report),
        headline=headline,
        further=further,
        shared_n={view.key: _shared_n(models, view.key) for view in (*headline, *further)},
        sections=list(_sections(report, curves)),
        fold_rows=FOLD_ROWS,
        samples=samples,
        samples_per_set=max((len(prompts) for prompts in samples.values()), default=0),
        text_limit=TEXT_LIMIT,
    )


def _sections(report: Mapping[str, Any], curves: Sequence[Plot]) -> Iterator[Section]:
    models = report["models"]
    overview = [plot for plot in (plot_outcomes(models), plot_trade_off(models)) if plot is not None]
    if overview:
        yield Section("In two figures" if len(overview) > 1 else "In a figure", "Figures", plots=overview, shown=True)
    tables: dict[str, list[Any]] = {}
    for table in extra_tables(report):
        tables.setdefault(COMPARISONS if table.title.startswith(COMPARISONS) else table.title, []).append(table)
    for title, of_title in tables.items():
        rows = sum(len(table.rows) for table in of_title)
        about = f"{rows:,} row{'s' if rows != 1 else ''}"
        forest = plot_forest(report["comparisons"]) if title == COMPARISONS else None
        yield Section(title, about, tables=of_title, plots=[forest] if forest else [])
    groups = [
        plot_rates(title, metric, models, group)
        for title, metric, group in FIGURES
        if len(groups_with(models, group, metric)) > 1
    ]
    if groups:
        about = f"{len(groups)} figure{'s' if len(groups) != 1 else ''}, and all rates in numbers"
        plots, tables_of_groups = [plot for plot in groups if plot is not None], list(group_tables(models))
        yield Section("By source and label", about, plots=plots, tables=tables_of_groups, folded="In numbers")
    if curves:
        yield Section("Training", f"{len(curves)} figure{'s' if len(curves) != 1 else ''}", plots=curves)
    if report["dataset"] is not None:
        steps = funnel(report["dataset"])
        words = "How the corpus became the preference pairs used for training."
        yield Section(
            "The dataset", f"{steps[-1].rows:,} pairs of {steps[0].rows:,} responses", steps=steps, words=words
        )


def _shared_n(models: Models, key: str) -> int | None:
    """Return the n of a metric if all models share it; None means that each cell shows its own n."""
    sizes = {model[key]["n"] for model in models.values()}
    return sizes.pop() if len(sizes) == 1 else None


def pick_samples(rows: Iterable[Mapping[str, Any]], per_set: int) -> dict[str, list[dict[str, Any]]]:
    """Pick the prompts to show, with all models' answers: in each set, the `per_set` ids with the lowest hash.

    The hash avoids cherry-picking, and makes every report on the same prompts show the same ones. `rows` are those of
    `samples.jsonl`; only the rows shown are held in memory.
    """
    shown: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        prompts = shown.setdefault(row["set"], {})
        if row["id"] not in prompts:
            prompts[row["id"]] = {**row, "answers": []}
            if len(prompts) > per_set:
                del prompts[max(prompts, key=_hash_of_id)]
        if row["id"] in prompts:
            prompts[row["id"]]["answers"].append(_answer(row))
    return {
        name: [prompts[id] for id in sorted(prompts, key=_hash_of_id)] for name, prompts in shown.items() if prompts
    }


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer as the page shows it, with the verdict in plain words and the CSS class of its colour."""
    outcome = row["outcome"]
    words = {"harmful": "harmful", "refusal": "refusal", "abstain": "judge abstained"}
    verdict = words.get(outcome, "neither" if row["kind"] == "unsafe" else "answered")
    if outcome == "refusal" and row["specific"]:
        verdict = "refusal, names the matter"
    if row["correct"] is not None and outcome == "safe":
        verdict = "correct" if row["correct"] else "wrong"
    css_class = outcome if outcome in ("harmful", "refusal") else "other"
    if row["kind"] != "unsafe" and outcome == "safe" and row["correct"] is not False:
        css_class = "safe"
    shown = {name: row[name] for name in ("model", "output", "truncated")}
    return {**shown, "verdict": verdict, "css_class": css_class}


def _hash_of_id(id: str) -> bytes:
    return hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
