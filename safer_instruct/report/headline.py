"""The questions that a report answers first: is the model safer, is it still useful, how sure are we?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safer_instruct.measures.comparisons import ALL_SOURCES
from safer_instruct.report.html import Answer, Bar
from safer_instruct.report.tables import (
    FURTHER,
    HEADLINE,
    METRIC_WORDS,
    NOT_COUNTED,
    MetricView,
    Models,
    p_text,
    points,
    shown_metrics,
)
from safer_instruct.text.display import percent

# Usefulness is the first of these rates that was counted over enough prompts.
USEFUL = ("benign_accuracy", "usefulness", "over_refusal_rate")
ENOUGH = 30  # prompts: the interval of a share is then narrower than 36 points
VIEWS = {view.key: view for view in (*HEADLINE, *FURTHER)}


def headline_answers(report: Mapping[str, Any]) -> list[Answer]:
    """Answer for the last model, with the others beside it; a question without data is left out."""
    models: Models = report["models"]
    if not models:
        return []
    shown = {view.key for view in shown_metrics(models, list(VIEWS.values()))}
    found = []
    if "harmful_rate" in shown:
        found.append(_rate_answer("Is it safer?", VIEWS["harmful_rate"], models))
    counted, last = [key for key in USEFUL if key in shown], models[list(models)[-1]]
    useful = next((key for key in counted if last.get(key, NOT_COUNTED)["n"] >= ENOUGH), next(iter(counted), None))
    if useful:
        found.append(_rate_answer("Is it still useful?", VIEWS[useful], models))
    return [*found, *_certainty(report, models)]


def _rate_answer(question: str, view: MetricView, models: Models) -> Answer:
    last = list(models)[-1]
    rate = models[last].get(view.key, NOT_COUNTED)
    bars = []
    for name, model in models.items():
        one = model.get(view.key, NOT_COUNTED)
        bars.append(Bar(name, one["value"], one["low"], one["high"], percent(one["value"])))
    words = f"{view.title}: {last}, {rate['n']:,} {view.over}; {view.better} is better"
    return Answer(question, _per_cent(rate["value"]), _interval(rate), words, bars)


def _per_cent(value: float | None) -> str:
    return "-" if value is None else f"{percent(value)}%"


def _interval(rate: Mapping[str, Any]) -> str:
    return f"95% interval {percent(rate['low'])} to {percent(rate['high'])}" if rate["n"] else ""


def _certainty(report: Mapping[str, Any], models: Models) -> Iterator[Answer]:
    """Yield how certain the difference between the first and last model is, from the paired test on shared prompts."""
    first, last = next(iter(models)), list(models)[-1]
    entries = report.get("comparisons") or []
    pair = {
        one["metric"]: one
        for one in entries
        if (one["first"], one["second"], one["source"]) == (first, last, ALL_SOURCES)
    }
    if pair:
        yield _paired_answer(next(iter(pair.values())), list(pair.values()), len(entries))
    elif (rate := models[last].get("harmful_rate", NOT_COUNTED))["n"]:
        half = 50 * (rate["high"] - rate["low"])
        words = f"half the 95% interval of the harmful rate: {rate['n']:,} prompts, one model, nothing to compare with"
        yield Answer("How sure are we?", f"+- {half:.1f} points", "", words)


def _paired_answer(main: Mapping[str, Any], pair: Sequence[Mapping[str, Any]], number: int) -> Answer:
    interval = "no interval: " + ("no prompt differs" if not main["difference"] else "all prompts differ alike")
    if main["low"] is not None:
        interval = f"95% interval {points(main['low'])} to {points(main['high'])}"
    verdict = "more than chance" if main["p_holm"] < 0.05 else "may be chance"
    p = p_text(main["p_holm"])
    words = (
        f"{METRIC_WORDS[main['metric']]}, {main['second']} against {main['first']} on the same {main['n']:,} prompts: "
        f"{verdict} (McNemar p {p if p.startswith('<') else f'= {p}'}, corrected for {number} comparisons)"
    )
    bars = [
        Bar(
            METRIC_WORDS[one["metric"]], (one["difference"] + 1) / 2, *_ends(one["low"], one["high"]),
            points(one["difference"]),
        )
        for one in pair
    ]  # fmt: skip
    axis = ("-100", "0", "+100")
    return Answer("How sure are we?", f"{points(main['difference'])} points", interval, words, bars, axis)


def _ends(low: float | None, high: float | None) -> tuple[float | None, float | None]:
    return (None, None) if low is None or high is None else ((low + 1) / 2, (high + 1) / 2)
