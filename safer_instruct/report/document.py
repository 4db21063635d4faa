"""Build the report of an evaluation as one JSON document, and as Markdown tables for a paper; `page.py` renders HTML.

`report.json` holds `summary` (one sentence), `warnings`, `models.NAME` (`rates.summarize`), `prompts.NAME` (the sets),
`overlap` (prompts that occur in training files), `dataset` (the report of induce.py) and `run` (how it was made). If
the command asked for them, it also holds `comparisons`, `contrasts`, `agreement`, `helpfulness`, `downstream`,
`rewards` and `runs`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config.files import write_text
from safer_instruct.report.dataset import funnel
from safer_instruct.report.tables import (
    FURTHER,
    HEADLINE,
    NOT_COUNTED,
    Models,
    extra_tables,
    group_tables,
    rates_table,
    shown_metrics,
)
from safer_instruct.text.display import escape_markdown, markdown_code, markdown_table, percent
from safer_instruct.text.prompt_sets import EvaluationPrompt, Overlap, prompts_fingerprint

REPORT_VERSION = 1
NO_PROMPTS = "A comparison without evaluation prompts: it shows only what was measured without them."
MANY_CUT = 0.02  # share of cut answers from which the token limit may have changed the rates


def describe_prompts(path: str, prompts: Sequence[EvaluationPrompt]) -> dict[str, Any]:
    """Describe a prompt set: the number of prompts of each kind, and a hash of its content."""
    return {
        "path": path,
        "n": len(prompts),
        "kinds": dict(sorted(Counter(prompt.kind for prompt in prompts).items())),
        "with_reference": sum(bool(prompt.reference) for prompt in prompts),
        "fingerprint": prompts_fingerprint(prompts),
    }


def build_report(
    *,
    models: Models,
    prompts: Mapping[str, Mapping[str, Any]],
    overlaps: Sequence[Overlap],
    dataset: Mapping[str, Any] | None,
    run: Mapping[str, Any],
    parts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Build the document that `report.json` holds.

    Args:
        models: Path, fingerprint and `rates.summarize` of each model; the first is the baseline.
        prompts: The `describe_prompts` of each set.
        overlaps: One entry for each training file that was compared with the prompts.
        dataset: The report that induce.py wrote for the training data, if it is known.
        run: How the numbers were made: commands, seeds, versions, seconds.
        parts: What `tables.extra_tables` shows: `comparisons`, `agreement`, ...
        notes: Further warnings.
    """
    return {
        "version": REPORT_VERSION,
        "summary": summary_sentence(models) if prompts else NO_PROMPTS,
        "warnings": [*notes, *_warnings(models, overlaps)],
        "models": dict(models),
        "prompts": dict(prompts),
        "overlap": [asdict(overlap) for overlap in overlaps],
        "dataset": dataset,
        "run": dict(run),
        **(parts or {}),
    }


def summary_sentence(models: Models) -> str:
    """State the finding in one sentence, built from the numbers: the last model against the first.

    It calls a rate up or down only if the two 95% intervals do not overlap.
    """
    first, last = next(iter(models)), list(models)[-1]
    model = models[last]
    clauses: list[str] = []
    if model["harmful_rate"]["n"]:
        harmful = _finding("harmful answers to unsafe prompts", "harmful_rate", first, last, models)
        clauses.append(f"{harmful}; {last} refuses {percent(model['refusal_rate']['value'])}% of them")
    over = model["over_refusal_rate"]
    if over["n"]:
        words = f"{percent(over['value'])}% of {over['n']} benign prompts by mistake"
        clauses[-1:] = [f"{clauses[0]} and {words}"] if clauses else [f"{last} refuses {words}"]
    if model["benign_accuracy"]["n"]:
        clauses.append(_finding("accuracy on benign prompts", "benign_accuracy", first, last, models))
    if model.get("safe_and_useful", NOT_COUNTED)["n"] and "safe_and_useful" in models[first]:
        clauses.append(_finding("safe and useful (harmonic mean)", "safe_and_useful", first, last, models))
    sentence = "; ".join(clauses) or "the judge gave no answer that could be counted"
    return sentence[0].upper() + sentence[1:] + "."


def _finding(subject: str, key: str, first: str, last: str, models: Models) -> str:
    """Return `accuracy on benign prompts: from 98.8% (base) down to 90.0% (dpo)`, or the single number there is."""
    before, after = models[first][key], models[last][key]
    if first == last or not before["n"]:
        interval = f"95% interval {percent(after['low'])} to {percent(after['high'])}, n = {after['n']}"
        return f"{subject}: {percent(after['value'])}% ({interval})"
    there, here = f"{percent(before['value'])}% ({first})", f"{percent(after['value'])}% ({last})"
    if after["high"] < before["low"]:
        return f"{subject}: from {there} down to {here}"
    if after["low"] > before["high"]:
        return f"{subject}: from {there} up to {here}"
    return f"{subject}: from {there} to {here}, the intervals overlap"


def _warnings(models: Models, overlaps: Iterable[Overlap]) -> Iterator[str]:
    for overlap in overlaps:
        if overlap.prompt_ids:
            yield (
                f"{len(overlap.prompt_ids)} of the prompts also occur in the training file {overlap.path}, so they do "
                "not test generalization; report.json lists them under 'overlap'."
            )
    for name, model in models.items():
        for reason, ids in model.get("unanswered", {}).items():
            words = "the file has no answer" if reason == "empty_cell" else f"there is no answer ({reason})"
            yield (
                f"{name}: for {len(ids)} of the prompts {words}; its n does not count them, and report.json lists them "
                "under 'unanswered'."
            )
        abstained = sum(outcomes.get("abstain", 0) for outcomes in model["counts"].values())
        if abstained:
            yield (
                f"{name}: the judge abstained on {abstained} of {model['abstain_rate']['n']} answers; "
                "they count only in the abstain rate."
            )
        cut, shortened = model["truncated_rate"], model["prompt_cut_rate"]
        if cut["n"] and cut["value"] > MANY_CUT:
            yield (
                f"{name}: {percent(cut['value'])}% of {cut['n']} answers were cut by the token limit "
                "(generation.max_new_tokens) and were judged as they are."
            )
        if shortened["value"]:
            yield (
                f"{name}: {percent(shortened['value'])}% of {shortened['n']} prompts were too long for the model's "
                "context and lost the end of their instruction."
            )


def render_markdown(report: Mapping[str, Any]) -> str:
    """Render the report as Markdown: percentages with their 95% intervals and n, ready for a paper."""
    models = report["models"]
    sections = ["# Evaluation", escape_markdown(report["summary"])]
    sections += [f"> **Note.** {escape_markdown(warning)}" for warning in report["warnings"]]
    tables = [*group_tables(models), *extra_tables(report)]
    headline = shown_metrics(models, HEADLINE)
    if headline:
        words = "Per cent, with 95% Wilson intervals in brackets and the number n of prompts behind each rate."
        further = shown_metrics(models, FURTHER)
        tables = [rates_table(models, headline, "", words), rates_table(models, further, "Further rates"), *tables]
    for table in tables:
        texts = [f"## {escape_markdown(table.title)}" if table.title else "", escape_markdown(table.caption)]
        sections += [*filter(None, texts), table.markdown]
    if report["dataset"] is not None:
        steps = [[step.name, str(step.rows), step.note] for step in funnel(report["dataset"])]
        sections += ["## The dataset", markdown_table(["stage", "rows", "note"], steps, left=(0, 2))]
    if report["run"]["stages"]:
        stages = [[s["name"], f"{s['seconds']:.1f}", markdown_code(s["command"])] for s in report["run"]["stages"]]
        header = ["stage", "seconds", "command"]
        sections += ["## How it was made", markdown_table(header, stages, left=(0, 2), markup=(2,))]
    return "\n\n".join(sections) + "\n"


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write `report.json`, indented, with keys in insertion order; ValueError for NaN, which is not valid JSON."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")
