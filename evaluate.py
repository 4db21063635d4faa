"""Several models side by side on several prompt sets: generate, judge, report.

    python evaluate.py models.base.path=FOLDER models.dpo.path=runs/si_dpo \
        prompts.unsafe.path=unsafe.jsonl prompts.benign.path=benign.jsonl expert=rules output=runs/report
    python evaluate.py prompts=published responses=csv path=test_set.csv expert=openai expert.model=NAME output=FOLDER
    python evaluate.py compare=[runs/a,runs/b] output=FOLDER

Writes report.json, report.md, report.html and samples.jsonl into `output`. The same command goes on with an evaluation
that was stopped. The text of models and prompts goes into samples.jsonl and behind a click of the page, nowhere else.
"""

from __future__ import annotations

from config.checks_evaluate import check_evaluate, with_paths
from config.schema import read_command, run_command
from config.settings import EvaluateConfig

if __name__ == "__main__":  # before the imports that take seconds: a mistake need not wait for them
    command = read_command("evaluate", EvaluateConfig, check_evaluate)

import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config.errors import UserError
from config.files import write_text
from config.settings import DatasetSettings
from safer_instruct.evaluation.answers import WHOLE, Respondent, describe_decoding
from safer_instruct.evaluation.downstream import encode_choice
from safer_instruct.evaluation.steps import Evaluation, Judged, ask_all, build_parts, judge_all, prepare, timed
from safer_instruct.measures.comparisons import compare_models
from safer_instruct.measures.rates import JudgedOutput, single_outcome, summarize
from safer_instruct.measures.reward_checks import check_rewards
from safer_instruct.provenance import git_state, package_versions
from safer_instruct.report.curves import plot_compared, plot_runs, read_curves
from safer_instruct.report.dataset import read_induction_report
from safer_instruct.report.document import (
    HEADLINE,
    build_report,
    describe_prompts,
    headline_text,
    render_markdown,
    sample_row,
    shown_metrics,
    write_json,
    write_samples,
)
from safer_instruct.report.evaluations import find_finished, read_evaluations
from safer_instruct.report.page import pick_samples, render_page
from safer_instruct.report.tables import extra_tables
from safer_instruct.report.training_runs import compare_training_runs, read_training_run
from safer_instruct.shards import resolve_shard

if TYPE_CHECKING:
    from safer_instruct.report.plots import Plot
    from trainers.data.token_store import TokenStore

log = logging.getLogger(__name__)

NO_JUDGE = {"name": "", "fingerprint": ""}


def main(config: EvaluateConfig) -> None:
    """The whole evaluation of one command, or the comparison of finished ones."""
    started = time.perf_counter()
    config = with_paths(config)
    evaluation = None if config.compare else prepare(config, resolve_shard(config.shard, os.environ))
    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be written to: {error.strerror}; choose another folder") from error
    report = compare_finished(config) if evaluation is None else evaluate_models(config, evaluation, started)
    if report is not None:
        _log_to_wandb(config, report)  # the answers are out of memory by now


def evaluate_models(config: EvaluateConfig, evaluation: Evaluation, started: float) -> dict[str, Any] | None:
    """Asks, judges, compares and writes the report; None for a shard, which writes none."""
    output = Path(config.output)
    seconds: dict[str, float] = {}
    answers = evaluation.given if evaluation.given is not None else ask_all(evaluation, config, seconds)
    judged, unanswered = judge_all(evaluation, answers, output / "ledger", seconds)
    if evaluation.shard != WHOLE:
        index, count = evaluation.shard
        print(
            f"shard {index} of {count}: {sum(map(len, judged.values()))} answers judged. When all shards are done, the "
            "same command with shard.count=1 shard.index=0 writes the report."
        )
        return None
    models = {
        name: {
            "path": respondent.path,
            "template": respondent.template,
            "fingerprint": respondent.fingerprint,
            **({"unanswered": unanswered[name]} if unanswered[name] else {}),
            **summarize(judged[name]),
        }
        for name, respondent in evaluation.respondents.items()
    }
    score = partial(score_choices, device=evaluation.device)
    parts = build_parts(config, evaluation, judged, models, seconds, score)
    if config.rewards.path is not None:
        with timed(seconds, "rewards"):
            parts["rewards"] = rewards_part(config, evaluation)
    seconds["total"] = round(time.perf_counter() - started, 2)
    return write_report(config, evaluation, judged, models, parts, seconds)


def score_choices(respondent: Respondent, pairs: Sequence[tuple[str, str]], *, device: torch.device) -> list[float]:
    """Log p(continuation | context) of each pair, in nats, by the kernel that training uses."""
    from safer_instruct.generation.models import load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer(respondent.model)
    model: Any = load_causal_lm(respondent.model)
    model = model.to(device).eval()
    scores = []
    for context, continuation in pairs:
        head, choice = encode_choice(tokenizer, context, continuation)
        input_ids = torch.tensor([head + choice], device=device)
        is_choice = torch.arange(input_ids.shape[1], device=device)[None] >= len(head)
        batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(is_choice), "response_mask": is_choice}
        scores.append(float(_logps(model, batch)))
    return scores


@torch.no_grad()
def _logps(model: Any, batch: Any) -> torch.Tensor:
    """The one place that knows how trainers/ is asked for log-probabilities of a micro-batch: (...,) float64."""
    from trainers.kernels.logps import sequence_logps

    return sequence_logps(model, batch)[0]


def rewards_part(config: EvaluateConfig, evaluation: Evaluation) -> dict[str, Any]:
    """Accuracy, margins and calibration of the implicit rewards of every model but the reference.

    Raises:
        UserError: The pairs cannot be read, or a model reads their text as other tokens than the reference does.
    """
    from preference_datasets import build_stores, load_examples
    from safer_instruct.generation.models import load_tokenizer
    from trainers.data.cache import usable_dir

    settings = config.rewards
    reference = str(settings.reference)
    logps: dict[str, torch.Tensor] = {}
    stores: dict[str, TokenStore] = {}
    for name, respondent in evaluation.respondents.items():
        pairs = DatasetSettings(str(settings.path), "si", respondent.template, exclude="", eval_fraction=0.0)
        stores[name] = build_stores(
            {"pairs": pairs},
            loss="preference",
            tokenizer=load_tokenizer(respondent.model),
            max_length=settings.max_length,
            max_prompt_length=settings.max_prompt_length,
            cache_dir=usable_dir(config.local_dirs),
        ).train
        logps[name] = pair_logps(respondent, stores[name], settings.batch_size, evaluation.device)
    labels = {example.id: example.label for example in load_examples(pairs, "pairs", pairs=True)}
    store = stores[reference]
    labels_of_rows = [labels.get(store.ids(row), "") for row in range(len(store))]
    models = {}
    for name in (name for name in logps if name != reference):
        if stores[name].key != store.key:
            raise UserError(
                f"models.{name} and models.{reference} read the pairs as different tokens: give both the template and "
                "the tokenizer that they were trained with"
            )
        ratios = logps[name] - logps[reference]
        models[name] = check_rewards((settings.beta * (ratios[:, 0] - ratios[:, 1])).tolist(), labels_of_rows)
    return {"reference": reference, "beta": settings.beta, "path": settings.path, "models": models}


def pair_logps(respondent: Respondent, store: TokenStore, batch_size: int, device: torch.device) -> torch.Tensor:
    """Log-probabilities of chosen and rejected for each row of a store, (N, 2) float64 on the CPU."""
    from safer_instruct.generation.models import load_causal_lm
    from trainers.data.batching import BatchLoader
    from trainers.kernels.logps import check_head

    model: Any = load_causal_lm(respondent.model)
    model = model.to(device).eval()
    check_head(model)
    loader = BatchLoader(
        store, batch_size=batch_size, seed=0, shuffle=False, num_epochs=1, num_examples=None, num_microbatches=1,
        max_tokens_per_microbatch=None, pad_token_id=0,
    )  # fmt: skip
    logps = torch.zeros(len(store), 2, dtype=torch.float64)
    for batch in loader.batches():
        for microbatch in batch.microbatches:
            logps[microbatch["row"]] = _logps(model, microbatch.to(device)).cpu()
    return logps


def compare_finished(config: EvaluateConfig) -> dict[str, Any]:
    """The report of runs and evaluations that are finished: nothing is generated or judged."""
    trained, evaluated = find_finished(config.compare)
    evaluations = read_evaluations(evaluated)
    judged = {name: rows for evaluation in evaluations.values() for name, rows in evaluation.judged.items()}
    models = {
        name: {**dict(evaluation.report["models"][name]), **summarize(rows)}
        for evaluation in evaluations.values()
        for name, rows in evaluation.judged.items()
    }
    parts: dict[str, Any] = {"comparisons": compare_models(judged, models)}
    curves = {name: read_curves(name, path) for name, path in config.curves.items()}
    figures = plot_runs(curves)
    if trained:
        runs = [read_training_run(name, folder) for name, folder in trained.items()]
        parts["runs"] = compare_training_runs(runs, config.sort_by)
        figures += plot_compared({run["name"]: read_curves(run["name"], run["path"]) for run in parts["runs"]["runs"]})
    first = next(iter(evaluations.values()), None)
    judges = {str(evaluation.report["run"]["judge"]["name"]) for evaluation in evaluations.values()}
    fingerprints = {evaluation.report["run"]["judge"]["fingerprint"] for evaluation in evaluations.values()}
    notes = [
        f"{name} was evaluated on its own: {note}"
        for name, one in evaluations.items()
        for note in one.report["warnings"]
    ]
    if len(fingerprints) > 1:
        notes.append(f"The judges differ ({', '.join(sorted(judges))}): part of a difference may be theirs.")
    run = {
        **_describe_run(config, {}),
        "judge": {"name": ", ".join(sorted(judges)), "fingerprint": "/".join(sorted(fingerprints))},
        "generation": first.report["run"]["generation"] if first is not None else describe_decoding(config.generation),
    }
    report = build_report(
        models=models, prompts=first.report["prompts"] if first is not None else {}, overlaps=[], notes=notes,
        dataset=read_induction_report(config.induction_report) if config.induction_report else None, run=run,
        parts=parts,
    )  # fmt: skip
    _write_files(config, report, judged, figures)
    return report


def write_report(
    config: EvaluateConfig,
    evaluation: Evaluation,
    judged: Judged,
    models: Mapping[str, Mapping[str, Any]],
    parts: Mapping[str, Any],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Writes the four files, prints the headline table, and gives what report.json holds."""
    judge = evaluation.judge
    run = {
        **_describe_run(config, seconds),
        "judge": {"name": judge.name, "fingerprint": judge.fingerprint} if judge is not None else NO_JUDGE,
        "device": str(evaluation.device),
    }
    run["stages"] = [*evaluation.stages, *run["stages"]]
    same = single_outcome([row for rows in judged.values() for row in rows])
    notes = [] if same is None else [
        f"The judge gave one and the same outcome, '{same}', to all answers of all models: it may tell nothing apart. "
        "Look at some answers (samples.jsonl) before you believe these rates."
    ]  # fmt: skip
    for note in notes:
        log.warning("warning: %s", note)
    report = build_report(
        models=models,
        prompts={
            name: describe_prompts(config.prompts[name].path, rows) for name, rows in evaluation.prompt_sets.items()
        },
        overlaps=evaluation.overlaps,
        dataset=evaluation.dataset,
        run=run,
        parts=parts,
        notes=notes,
    )
    _write_files(config, report, judged, plot_runs(evaluation.curves))
    return report


def _write_files(
    config: EvaluateConfig, report: Mapping[str, Any], judged: Mapping[str, Sequence[JudgedOutput]], curves: list[Plot]
) -> None:
    output = Path(config.output)
    write_samples(output / "samples.jsonl", (sample_row(name, row) for name, rows in judged.items() for row in rows))
    write_text(output / "report.md", render_markdown(report))
    samples = (sample_row(name, row) for name, rows in judged.items() for row in rows)
    page = render_page(report, pick_samples(samples, config.samples_per_set), curves)
    write_text(output / "report.html", page)
    write_json(output / "report.json", report)  # last: whoever finds it finds the others
    if report["models"] and report["prompts"]:
        print(headline_text(report["models"]))
    print(f"\n{report['summary']}\n\nreport: {output / 'report.html'}")


def _log_to_wandb(config: EvaluateConfig, report: Mapping[str, Any]) -> None:
    if not config.wandb.enabled or config.wandb.mode == "disabled":
        return
    from trainers.run.metrics import log_tables

    rates: list[list[Any]] = [
        [name, view.key, *(model[view.key][field] for field in ("value", "low", "high", "n"))]
        for name, model in report["models"].items()
        for view in shown_metrics(report["models"], HEADLINE)
    ]
    tables = {"rates": (["model", "rate", "value", "low", "high", "n"], rates)}
    tables |= {table.title: (list(table.header), [list(row) for row in table.rows]) for table in extra_tables(report)}
    log_tables(config.wandb, name=Path(config.output).name, folder=config.output, tables=tables)


def _describe_run(config: EvaluateConfig, seconds: Mapping[str, float]) -> dict[str, Any]:
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return {
        "command": command,
        "stages": [{"name": "evaluate", "command": command, "seconds": seconds["total"]}] if seconds else [],
        "seconds": dict(seconds),
        "seed": config.generation.seed,
        "generation": describe_decoding(config.generation),
        "git": git_state(),
        "versions": package_versions(),
    }


if __name__ == "__main__":
    run_command(command, main)
