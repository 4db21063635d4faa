"""Compare several models on several prompt sets: generate, judge, report.

    python evaluate.py models.base.path=FOLDER models.dpo.path=runs/si_dpo \
        prompts.unsafe.path=unsafe.jsonl prompts.benign.path=benign.jsonl expert=rules output=runs/report
    python evaluate.py prompts=published responses=csv path=test_set.csv expert=openai expert.model=NAME output=FOLDER
    python evaluate.py "compare=[runs/a,runs/b]" output=FOLDER

Writes report.json, report.md, report.html and samples.jsonl to `output`. Rerun the same command to resume an evaluation
that was stopped. Prompts and answers appear only in samples.jsonl and, behind a click, on the HTML page.
"""

from __future__ import annotations

from trainers.distributed.preemption import exit_behind_ledgers  # isort: skip

from config.checks_evaluate import check_evaluate, with_paths
from config.schema import read_command, run_command
from config.settings import EngineSettings, EvaluateConfig, ShardSettings

if __name__ == "__main__":  # before the slow imports, so that a mistake in the command is reported immediately
    exit_behind_ledgers()
    command = read_command("evaluate", EvaluateConfig, check_evaluate)

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config.errors import UserError
from safer_instruct.engine_ray import run_on_ray
from safer_instruct.evaluation.answers import WHOLE, Advance
from safer_instruct.evaluation.downstream import encode_choice
from safer_instruct.evaluation.forecast import forecast_evaluation
from safer_instruct.evaluation.publish import compare_finished, write_report
from safer_instruct.evaluation.respondents import Respondent
from safer_instruct.evaluation.rewards import count_trained_on, describe_rewards, join_labels, pairs_settings
from safer_instruct.evaluation.steps import Evaluation, ask_all, build_parts, judge_all, prepare, timed
from safer_instruct.induction.status import live_line
from safer_instruct.measures.rates import summarize
from safer_instruct.report.tables import HEADLINE, extra_tables, shown_metrics
from safer_instruct.shards import resolve_shard
from safer_instruct.text.exclusion import turn_keys
from trainers.distributed.launch import pick_device

if TYPE_CHECKING:
    from trainers.data.token_store import TokenStore


def main(config: EvaluateConfig) -> None:
    """Run the whole evaluation of one command, or compare finished ones."""
    started = time.perf_counter()
    config = with_paths(config)
    spread = config if config.engine.name == "ray" and not config.compare else None
    if spread is not None:
        config = replace(config, engine=EngineSettings(), shard=ShardSettings(0, 1))
    evaluation = (
        None if config.compare else prepare(config, resolve_shard(config.shard, os.environ), pick_device(config.device))
    )
    if config.dry_run and evaluation is not None:
        print(forecast_evaluation(config, evaluation))
        return
    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be written to: {error.strerror}; choose another folder") from error
    if spread is not None:
        work, status = partial(run_one_shard, spread), partial(live_line, output / "ledger")
        run_on_ray(work, spread.shard.count or 1, spread.engine, status)
    report = compare_finished(config) if evaluation is None else evaluate_models(config, evaluation, started)
    if report is not None:
        _log_to_wandb(config, report)  # here, because the answers have been freed by now


def run_one_shard(config: EvaluateConfig, index: int) -> None:
    """Answer and judge one shard of the prompts, in a worker."""
    main(replace(config, engine=EngineSettings(), shard=ShardSettings(index, config.shard.count)))


def evaluate_models(config: EvaluateConfig, evaluation: Evaluation, started: float) -> dict[str, Any] | None:
    """Generate, judge, compare and write the report; a shard writes no report and returns None."""
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
        with timed(seconds, "rewards", len(evaluation.respondents)) as progress:
            parts["rewards"] = rewards_part(config, evaluation, progress)
    seconds["total"] = round(time.perf_counter() - started, 2)
    return write_report(config, evaluation, judged, models, parts, seconds)


def load_model(respondent: Respondent, device: torch.device) -> Any:
    """Load a model to compute log-probabilities with."""
    from safer_instruct.generation.models import load_causal_lm
    from trainers.kernels.head_check import check_head

    model: Any = load_causal_lm(respondent.model)
    model = model.to(device).eval()
    check_head(model)
    return model


@torch.no_grad()
def score_choices(respondent: Respondent, pairs: Sequence[tuple[str, str]], *, device: torch.device) -> list[float]:
    """Return log p(continuation | context) of each pair, in nats."""
    from safer_instruct.generation.models import load_tokenizer
    from trainers.kernels.logps import sequence_logps

    tokenizer = load_tokenizer(respondent.model)
    model = load_model(respondent, device)
    scores = []
    for context, continuation in pairs:
        head, choice = encode_choice(tokenizer, context, continuation)
        input_ids = torch.tensor([head + choice], device=device)
        is_choice = torch.arange(input_ids.shape[1], device=device)[None] >= len(head)
        batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(is_choice), "response_mask": is_choice}
        scores.append(float(sequence_logps(model, batch)[0]))
    return scores


def rewards_part(config: EvaluateConfig, evaluation: Evaluation, progress: Advance) -> dict[str, Any]:
    """Compute the implicit rewards of every model except the reference, and summarise them for the report.

    Raises:
        UserError: The pairs cannot be read, or a model's tokens for them differ from the reference's.
    """
    from preference_datasets import build_stores, load_examples
    from safer_instruct.generation.models import load_tokenizer
    from trainers.data.cache import usable_dir

    settings, reference = config.rewards, str(config.rewards.reference)
    pairs = pairs_settings(str(settings.path))
    labels: dict[str, list[str]] = {}
    ids: dict[str, list[str]] = {}
    for example in load_examples(pairs, "pairs", pairs=True):
        labels.setdefault(example.id, []).append(example.label)
        ids.setdefault(turn_keys(example)[-1], []).append(example.id)
    trained_on = count_trained_on(evaluation.respondents, ids)
    logps: dict[str, torch.Tensor] = {}
    stores: dict[str, TokenStore] = {}
    for name, respondent in evaluation.respondents.items():
        stores[name] = build_stores(
            {"pairs": replace(pairs, template=respondent.template, system=respondent.system or None)},
            loss="preference",
            tokenizer=load_tokenizer(respondent.model),
            max_length=settings.max_length,
            max_prompt_length=settings.max_prompt_length,
            cache_dir=usable_dir(config.local_dirs),
        ).train
        logps[name], num_tokens = pair_logps(respondent, stores[name], settings.batch_size, evaluation.device)
        progress(1)
    store = stores[reference]
    for name in evaluation.respondents:
        if stores[name].content != store.content:
            raise UserError(
                f"models.{name} and models.{reference} read the pairs as different tokens: give both the template and "
                "the tokenizer that they were trained with"
            )
    margins = {
        name: scale.margins(logps[name], logps[reference], num_tokens)
        for name, scale in evaluation.reward_scales.items()
    }
    labels_of_rows = join_labels(map(store.ids, range(len(store))), labels)
    return describe_rewards(margins, labels_of_rows, evaluation.reward_scales, trained_on, settings)


@torch.no_grad()
def pair_logps(
    respondent: Respondent, store: TokenStore, batch_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities (nats) and token counts of chosen and rejected, (N, 2) each, in store order."""
    from trainers.data.batching import BatchLoader
    from trainers.data.cutters import PaddedCutter
    from trainers.kernels.logps import sequence_logps

    model = load_model(respondent, device)
    loader = BatchLoader(store, PaddedCutter(pad_token_id=0), batch_size=batch_size)
    logps = torch.zeros(len(store), 2, dtype=torch.float64)
    num_tokens = torch.zeros(len(store), 2, dtype=torch.int64)
    for batch in loader.batches():
        for microbatch in batch.microbatches:
            rows = microbatch["row"]
            logps[rows], num_tokens[rows] = (column.cpu() for column in sequence_logps(model, microbatch.to(device)))
    if not logps.isfinite().all():
        raise UserError(
            f"models.{respondent.name}: its log-probabilities are not finite; its weights may not be finite either"
        )
    return logps, num_tokens


def _log_to_wandb(config: EvaluateConfig, report: Mapping[str, Any]) -> None:
    if not config.wandb.enabled or config.wandb.mode == "disabled":
        return
    from trainers.run.metrics_log import log_tables

    fields = ("value", "low", "high", "n")
    rates: list[list[Any]] = [
        [name, view.key, *(model[view.key][field] for field in fields)]
        for name, model in report["models"].items()
        for view in shown_metrics(report["models"], HEADLINE)
    ]
    tables = {"rates": (["model", "rate", *fields], rates)}
    tables |= {table.title: (list(table.header), [list(row) for row in table.rows]) for table in extra_tables(report)}
    log_tables(config.wandb, name=Path(config.output).name, folder=config.output, tables=tables)


if __name__ == "__main__":
    run_command(command, main)
