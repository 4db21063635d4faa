"""What an evaluation found, as one JSON document and as Markdown tables for a paper; `page.py` renders it too.

`report.json`: `summary` (one sentence), `warnings`, `models.NAME` (`judging.summarize`), `prompts.NAME` (the sets),
`overlap` (prompts that occur in training files), `dataset` (the report of induce.py), `run` (how it was made), and,
where the command asked for them, `comparisons`, `agreement`, `helpfulness`, `downstream`, `rewards` and `runs`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from config.files import replacing, write_text
from safer_instruct.measures.rates import JudgedOutput, correctness
from safer_instruct.report.dataset import funnel
from safer_instruct.report.tables import extra_tables
from safer_instruct.text.display import escape_markdown, markdown_code, markdown_table, percent
from safer_instruct.text.prompt_sets import EvaluationPrompt, Overlap, prompts_fingerprint

REPORT_VERSION = 1
NO_PROMPTS = "Side by side, by what was measured without asking any prompt."


@dataclass(frozen=True, slots=True)
class MetricView:
    """How a metric is shown: its words, the prompts it is counted over, and which way is better."""

    key: str
    title: str
    over: str
    better: str = ""  # lower | higher | ""


HEADLINE = (
    MetricView("harmful_rate", "Harmful answers", "unsafe prompts", "lower"),
    MetricView("refusal_rate", "Refusals", "unsafe prompts", "higher"),
    MetricView("specific_refusal_rate", "Refusals that name the matter", "unsafe prompts", "higher"),
    MetricView("safe_helpful_rate", "Safe and helpful", "unsafe prompts", "higher"),
    MetricView("neither_rate", "Neither harmful nor refusal", "unsafe prompts", "lower"),
    MetricView("over_refusal_rate", "Over-refusal", "benign and near prompts", "lower"),
    MetricView("benign_accuracy", "Accuracy, benign", "benign prompts", "higher"),
    MetricView("near_accuracy", "Accuracy, near", "benign prompts that look unsafe", "higher"),
)
FURTHER = (
    MetricView("specific_among_refusals", "Refusals that name the matter", "refusals of unsafe prompts", "higher"),
    MetricView("harmful_on_benign_rate", "Harmful answers, benign and near", "benign and near prompts", "lower"),
    MetricView("truncated_rate", "Cut by the token limit", "all prompts"),
    MetricView("prompt_cut_rate", "Prompt cut to fit the context", "all prompts"),
    MetricView("abstain_rate", "Judge abstained", "all prompts"),
)


def shown_metrics(models: Mapping[str, Mapping[str, Any]], views: Sequence[MetricView]) -> list[MetricView]:
    """The metrics that at least one model has a number for."""
    return [view for view in views if any(model[view.key]["n"] for model in models.values())]


def describe_prompts(path: str, prompts: Sequence[EvaluationPrompt]) -> dict[str, Any]:
    """What a set holds: how many prompts of each kind, and a hash of its content."""
    return {
        "path": path,
        "n": len(prompts),
        "kinds": dict(sorted(Counter(prompt.kind for prompt in prompts).items())),
        "with_reference": sum(bool(prompt.reference) for prompt in prompts),
        "fingerprint": prompts_fingerprint(prompts),
    }


def build_report(
    *,
    models: Mapping[str, Mapping[str, Any]],
    prompts: Mapping[str, Mapping[str, Any]],
    overlaps: Sequence[Overlap],
    dataset: Mapping[str, Any] | None,
    run: Mapping[str, Any],
    parts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The document that `report.json` holds.

    Args:
        models: For each model its path, its fingerprint and its `judging.summarize`; the first is the baseline.
        prompts: For each set what `describe_prompts` says of it.
        overlaps: One entry for each training file that was compared with the prompts.
        dataset: The report that induce.py wrote for the training data, if it is known.
        run: Commands, seeds, versions, seconds: how the numbers came about.
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


def summary_sentence(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The finding in one sentence, made from the numbers: the last model against the first.

    A change is called one only where the two 95% intervals do not touch.
    """
    first, last = next(iter(models)), list(models)[-1]
    harmful, refusal, over = (models[last][key] for key in ("harmful_rate", "refusal_rate", "over_refusal_rate"))
    parts: list[str] = []
    if harmful["n"]:
        clause = _finding("harmful answers to unsafe prompts", "harmful_rate", first, last, models)
        parts.append(f"{clause}; {last} refuses {percent(refusal['value'])}% of them")
    if over["n"]:
        verb = "and" if parts else f"{last} refuses"
        parts.append(f"{verb} {percent(over['value'])}% of {over['n']} benign prompts by mistake")
    sentence = " ".join(parts)
    if models[last]["benign_accuracy"]["n"]:
        clause = _finding("accuracy on benign prompts", "benign_accuracy", first, last, models)
        sentence = f"{sentence}; {clause}" if sentence else clause
    if not sentence:
        return "The judge gave no answer that could be counted."
    return sentence[0].upper() + sentence[1:] + "."


def _finding(subject: str, key: str, first: str, last: str, models: Mapping[str, Mapping[str, Any]]) -> str:
    """`accuracy on benign prompts: from 98.8% (base) down to 90.0% (dpo)`, or the one number where there is one."""
    before, after = models[first][key], models[last][key]
    if first == last or not before["n"]:
        interval = f"95% interval {percent(after['low'])} to {percent(after['high'])}, n = {after['n']}"
        return f"{subject}: {percent(after['value'])}% ({interval})"
    direction = "down to" if after["high"] < before["low"] else "up to" if after["low"] > before["high"] else "to"
    unclear = ", the intervals overlap" if direction == "to" else ""
    there, here = percent(before["value"]), percent(after["value"])
    return f"{subject}: from {there}% ({first}) {direction} {here}% ({last}){unclear}"


def _warnings(models: Mapping[str, Mapping[str, Any]], overlaps: Iterable[Overlap]) -> list[str]:
    warnings = [
        f"{len(overlap.prompt_ids)} of the prompts also occur in the training file {overlap.path}, so that they test "
        "nothing new; report.json lists them under 'overlap'."
        for overlap in overlaps
        if overlap.prompt_ids
    ]
    for name, model in models.items():
        warnings += _unanswered(name, model)
        abstained = sum(outcomes.get("abstain", 0) for outcomes in model["counts"].values())
        if abstained:
            warnings.append(
                f"{name}: the judge abstained on {abstained} of {model['abstain_rate']['n']} answers; "
                "they are in no rate but the abstain rate."
            )
        cut = model["truncated_rate"]
        if cut["n"] and cut["value"] > 0.02:
            warnings.append(
                f"{name}: {percent(cut['value'])}% of {cut['n']} answers were cut by the token limit "
                "(generation.max_new_tokens) and were judged as they are."
            )
        shortened = model["prompt_cut_rate"]
        if shortened["value"]:
            warnings.append(
                f"{name}: {percent(shortened['value'])}% of {shortened['n']} prompts were too long for the model's "
                "context and lost the end of their instruction."
            )
    return warnings


def _unanswered(name: str, model: Mapping[str, Any]) -> list[str]:
    """Prompts that there is no answer to."""
    warnings = []
    for reason, ids in model.get("unanswered", {}).items():
        words = "the file has no answer" if reason == "empty_cell" else f"there is no answer ({reason})"
        warnings.append(
            f"{name}: for {len(ids)} of the prompts {words}; they are not in its n, and report.json lists them under "
            "'unanswered'."
        )
    return warnings


def sample_row(model: str, output: JudgedOutput) -> dict[str, Any]:
    """One line of `samples.jsonl`: the prompt, the answer and its judgement."""
    prompt, judgement = output.prompt, output.judgement
    return {
        "model": model,
        "set": prompt.set_name,
        "id": prompt.id,
        "kind": prompt.kind,
        "label": prompt.label,
        "source": prompt.source,
        "instruction": prompt.instruction,
        "output": output.text,
        "truncated": output.truncated,
        "outcome": judgement.outcome,
        "harm_label": judgement.label,
        "specific": judgement.specific,
        "correct": correctness(output),
        "helpful": judgement.helpful,
        "prompt_cut": output.prompt_cut,
    }


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown: percentages with their 95% intervals and n, ready for a paper."""
    models = report["models"]
    sections = ["# Evaluation", escape_markdown(report["summary"])]
    sections += [f"> **Note.** {escape_markdown(warning)}" for warning in report["warnings"]]
    if shown_metrics(models, HEADLINE):
        sections.append(
            "Per cent, with 95% Wilson intervals in brackets and the number of prompts that each is counted over."
        )
        sections.append(_metric_table(models, shown_metrics(models, HEADLINE)))
        sections += ["## Further rates", _metric_table(models, shown_metrics(models, FURTHER))]
    for group, title in (("by_source", "source"), ("by_label", "label")):
        for view in shown_metrics(models, HEADLINE):
            names = sorted({n for model in models.values() for n, rates in model[group].items() if view.key in rates})
            if len(names) > 1:
                sections += [f"## {view.title}, by {title}", _group_table(models, group, view, names)]
    for table in extra_tables(report):
        sections += [f"## {escape_markdown(table.title)}", escape_markdown(table.caption)]
        sections.append(markdown_table(table.header, table.rows, left=table.left))
    if report["dataset"] is not None:
        rows = [[step.name, str(step.rows), step.note] for step in funnel(report["dataset"])]
        sections += ["## The dataset", markdown_table(["stage", "rows", "note"], rows, left=(0, 2))]
    if report["run"]["stages"]:
        rows = [[s["name"], f"{s['seconds']:.1f}", markdown_code(s["command"])] for s in report["run"]["stages"]]
        sections += [
            "## How it was made",
            markdown_table(["stage", "seconds", "command"], rows, left=(0, 2), markup=(2,)),
        ]
    return "\n\n".join(sections) + "\n"


def _metric_table(models: Mapping[str, Mapping[str, Any]], views: Sequence[MetricView]) -> str:
    arrows = {"lower": " (lower is better)", "higher": " (higher is better)", "": ""}
    rows = [
        [f"{view.title}, {view.over}{arrows[view.better]}", *(rate_text(model[view.key]) for model in models.values())]
        for view in views
    ]
    return markdown_table(["", *models], rows)


def _group_table(models: Mapping[str, Mapping[str, Any]], group: str, view: MetricView, names: Sequence[str]) -> str:
    empty = {"value": None, "low": None, "high": None, "n": 0}
    rows = [
        [name, *(rate_text(model[group].get(name, {}).get(view.key, empty)) for model in models.values())]
        for name in names
    ]
    return markdown_table(["", *models], rows)


def rate_text(rate: Mapping[str, Any]) -> str:
    """`94.3 [91.2, 96.4] (n=600)`, or `-` where nothing was counted."""
    if rate["n"] == 0:
        return "-"
    return f"{percent(rate['value'])} [{percent(rate['low'])}, {percent(rate['high'])}] (n={rate['n']})"


def headline_text(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The headline rates as a plain table, per cent with 95% intervals and n."""
    rows = [["", *models]]
    for view in shown_metrics(models, HEADLINE):
        rows.append([view.title, *(rate_text(model[view.key]) for model in models.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(lines)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """`report.json`: indented, keys in the order in which they were made; NaN is refused, no JSON knows it."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_samples(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`samples.jsonl`, streamed; a text stays as the model gave it, as JSON escapes where it is no plain ASCII."""
    with replacing(path) as part, part.open("w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
