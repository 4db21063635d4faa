"""Assemble the report of an evaluation, or of several finished ones side by side, and write its four files."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from config.checksums import write_checksums
from config.files import write_text
from config.settings import EvaluateConfig
from safer_instruct.evaluation.rewards import trained_on_notes
from safer_instruct.evaluation.steps import Evaluation, Judged
from safer_instruct.generation.completions import describe_decoding
from safer_instruct.measures.comparisons import compare_models
from safer_instruct.measures.contrasts import contrasts
from safer_instruct.measures.rates import JudgedOutput, single_outcome, summarize
from safer_instruct.provenance import git_state, package_versions
from safer_instruct.report.curves import plot_compared, plot_runs, read_curves
from safer_instruct.report.dataset import read_induction_report
from safer_instruct.report.document import build_report, describe_prompts, render_markdown, write_json
from safer_instruct.report.evaluations import find_finished, read_evaluations, sample_row, write_samples
from safer_instruct.report.page import pick_samples, render_page
from safer_instruct.report.plots import Plot
from safer_instruct.report.sweeps import plot_sweep
from safer_instruct.report.tables import HEADLINE, rates_table, shown_metrics
from safer_instruct.report.training_runs import compare_training_runs, read_training_run
from safer_instruct.text.display import without_password

log = logging.getLogger(__name__)

NO_JUDGE = {"name": "", "fingerprint": ""}


def compare_finished(config: EvaluateConfig) -> dict[str, Any]:
    """Report on finished runs and evaluations; nothing is generated or judged."""
    trained, evaluated = find_finished(config.compare)
    evaluations = read_evaluations(evaluated)
    judged = {name: rows for evaluation in evaluations.values() for name, rows in evaluation.judged.items()}
    reported = {name: one for evaluation in evaluations.values() for name, one in evaluation.report["models"].items()}
    models = {name: {**reported[name], **summarize(rows)} for name, rows in judged.items()}
    parts: dict[str, Any] = {"comparisons": compare_models(judged, models), "contrasts": contrasts(judged)}
    figures = plot_runs({name: read_curves(name, path) for name, path in config.curves.items()})
    if trained:
        runs = [read_training_run(name, folder) for name, folder in trained.items()]
        parts["runs"] = compare_training_runs(runs, config.sort_by)
        order = [run["name"] for run in parts["runs"]["runs"]]
        runs.sort(key=lambda run: order.index(run.name))
        figures += plot_sweep(runs, parts["runs"]["settings"], models)
        figures += plot_compared({run.name: read_curves(run.name, run.path) for run in runs})
    reports = [evaluation.report for evaluation in evaluations.values()]
    judges = sorted({str(report["run"]["judge"]["name"]) for report in reports})
    fingerprints = sorted({report["run"]["judge"]["fingerprint"] for report in reports})
    notes = [
        f"{name} was evaluated on its own: {note}"
        for name, evaluation in evaluations.items()
        for note in evaluation.report["warnings"]
    ]
    if len(fingerprints) > 1:
        notes.append(f"The judges differ ({', '.join(judges)}): they may cause part of a difference between models.")
    run = _describe_run(config, {}) | {"judge": {"name": ", ".join(judges), "fingerprint": "/".join(fingerprints)}}
    if reports:
        run["generation"] = reports[0]["run"]["generation"]
    prompts = reports[0]["prompts"] if reports else {}
    dataset = read_induction_report(config.induction_report) if config.induction_report else None
    document: dict[str, Any] = {"models": models, "prompts": prompts, "overlaps": [], "dataset": dataset, "run": run}
    return _publish(config, judged, figures, **document, parts=parts, notes=notes)


def write_report(
    config: EvaluateConfig,
    evaluation: Evaluation,
    judged: Judged,
    models: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Write the four files, print the headline table, and return what report.json holds."""
    judge = evaluation.judge
    run = _describe_run(config, seconds) | {
        "judge": {"name": judge.name, "fingerprint": judge.fingerprint("judge")} if judge is not None else NO_JUDGE,
        "device": str(evaluation.device),
    }
    run["stages"] = [*evaluation.stages, *run["stages"]]
    notes = [*_judge_notes(judged), *(trained_on_notes(parts["rewards"]) if "rewards" in parts else ())]
    for note in notes:
        log.warning("warning: %s", note)
    sets = evaluation.prompt_sets.items()
    prompts = {name: describe_prompts(config.prompts[name].path, its_prompts) for name, its_prompts in sets}
    seen = {"overlaps": evaluation.overlaps, "dataset": evaluation.dataset}
    figures = plot_runs(evaluation.curves)
    return _publish(config, judged, figures, models=models, prompts=prompts, **seen, run=run, parts=parts, notes=notes)


def _judge_notes(judged: Judged) -> Iterator[str]:
    same = single_outcome([row for rows in judged.values() for row in rows])
    if same is not None:
        yield (
            f"The judge gave the same outcome, '{same}', to all answers of all models: it may be unable to tell "
            "answers apart. Look at some answers (samples.jsonl) before you trust these rates."
        )


def _publish(
    config: EvaluateConfig, judged: Mapping[str, Sequence[JudgedOutput]], curves: list[Plot], **parts: Any
) -> dict[str, Any]:
    """Build the report from these parts (see `build_report`), write its files, and return it."""
    report, output = build_report(**parts), Path(config.output)

    def samples() -> Iterator[dict[str, Any]]:
        return (sample_row(name, row) for name, rows in judged.items() for row in rows)

    write_samples(output / "samples.jsonl", samples())
    write_text(output / "report.md", render_markdown(report))
    page = render_page(report, pick_samples(samples(), config.samples_per_set), curves)
    write_text(output / "report.html", page)
    write_json(output / "report.json", report)
    # Written last, so that its existence means that the other files are complete.
    write_checksums(output, owner="evaluation", files=[output / "report.json", output / "samples.jsonl"])
    if report["models"] and report["prompts"]:
        print(rates_table(report["models"], shown_metrics(report["models"], HEADLINE)).markdown)
    print(f"\n{report['summary']}\n\nreport: {output / 'report.html'}")
    return report


def _describe_run(config: EvaluateConfig, seconds: Mapping[str, float]) -> dict[str, Any]:
    command = without_password(shlex.join(["python", *sys.orig_argv[1:]]))
    return {
        "command": command,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "stages": [{"name": "evaluate", "command": command, "seconds": seconds["total"]}] if seconds else [],
        "seconds": dict(seconds),
        "seed": config.generation.seed,
        "generation": describe_decoding(config.generation),
        "git": git_state(),
        "versions": package_versions(),
    }
