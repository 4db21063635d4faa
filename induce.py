"""From a corpus of unsafe responses to a preference dataset: induce -> (score ->) filter -> respond -> merge.

    python induce.py corpus.path=corpus.jsonl model=tiny model.archive=runs/reverse expert=rules output=data/si

Every stage appends to a ledger in `output/ledger`, so rerunning the same command resumes a killed run. In a Slurm array
each task runs its own shard (`shard.index`, `shard.count`); run `stage=merge` after the last. `stage=status` shows the
progress of all shards, `stage=audit` checks a finished dataset (docs/scale.md), and `stage=review` builds a page on
which people judge its pairs (docs/stages/review.md). `stage=replay` and `stage=contrast` make pairs whose prompts
should be answered, for `datasets=[si,replay,contrast]` (docs/useful.md).
Settings: config/induce.yaml, config/settings.py (InduceConfig).
"""

from __future__ import annotations

from trainers.distributed.preemption import exit_behind_ledgers  # isort: skip

from pathlib import Path

from config.checks_induce import check_induce
from config.schema import read_command, run_command
from config.settings import InduceConfig
from safer_instruct.induction.status import render_status

if __name__ == "__main__":  # before the slow imports: config errors and stage=status should not wait for them
    exit_behind_ledgers()
    command = read_command("induce", InduceConfig, check_induce)
    if all(config.stage == "status" for config in command.configs):
        run_command(command, lambda config: print(render_status(Path(config.output) / "ledger")))
        raise SystemExit

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch

from config.errors import UserError
from config.names import BENIGN_STAGES
from config.settings import MISSING, OpenAIExpertSettings
from safer_instruct.dataset.benign import Refusals, contrast_pairs, read_unsafe_rows, replay_pairs, write_pairs
from safer_instruct.dataset.files import FILES
from safer_instruct.dataset.merge import MERGE, merge
from safer_instruct.dataset.reviews import measure_reviews, read_rejections, read_reviews
from safer_instruct.dataset.scratch import lock_output
from safer_instruct.dataset.similarity import LeakageGuard
from safer_instruct.experts.expert import Expert, build_expert
from safer_instruct.generation.backends import model_name
from safer_instruct.induction.benign import (
    CONTRAST,
    REPLAY,
    num_missing,
    read_benign,
    read_records,
    read_unsafe,
    run_contrast,
    run_replay,
    starting_model,
)
from safer_instruct.induction.forecast import forecast_induction
from safer_instruct.induction.ledger import shard_path
from safer_instruct.induction.ledgers import find_ledgers, require_own_folder, require_same_shards
from safer_instruct.induction.round_trip import RoundTrip
from safer_instruct.induction.shard import (
    budget_left,
    kept_pairs,
    resolve_min_score,
    run_filter,
    run_induce,
    run_respond,
    run_score,
)
from safer_instruct.induction.spread import spread_stages
from safer_instruct.induction.stages import FILTER, INDUCE, RESPOND, SCORE, STAGES, VARY
from safer_instruct.induction.vary import run_vary
from safer_instruct.provenance import package_versions
from safer_instruct.shards import resolve_shard
from safer_instruct.text.corpus import read_corpus
from safer_instruct.text.display import without_password
from safer_instruct.text.exclusion import read_instruction_keys, turn_keys
from safer_instruct.text.readers import read_rows
from trainers.distributed.launch import pick_device

NUM_SHOWN = 3  # pairs that log_text=true prints
LOCK_SECONDS = 600.0  # wait this long while another shard writes the same pairs


def main(config: InduceConfig) -> None:
    """Run the stages of one shard, merge all shards, or inspect what exists."""
    if config.stage == MERGE:
        merge_shards(config)
    elif config.stage == "status":
        print(render_status(Path(config.output) / "ledger"))
    elif config.stage == "audit":
        run_audit(config)
    elif config.stage == "review":
        run_review(config)
    elif config.stage in BENIGN_STAGES:
        run_benign(config)
    elif config.engine.name == "ray" and not config.dry_run:
        spread_stages(config, run_shard)
        if config.stage == "all":
            merge_shards(config)
    else:
        run_shard(config)


def run_shard(config: InduceConfig) -> None:
    """Run the stages of one shard; stage=all also merges the dataset if there is only one shard."""
    ledgers = Path(config.output) / "ledger"
    index, count = resolve_shard(config.shard, os.environ)
    require_same_shards(ledgers, count)
    stages = _stages(config, count)
    if config.dry_run:
        print(forecast_induction(config, stages, (index, count)))
        return
    device = pick_device(config.device)
    paths = {stage: shard_path(ledgers, stage, index, count) for stage in STAGES}
    paid = {stage: paths[stage] for stage in (FILTER, RESPOND, VARY)}
    expert = _checked_expert(config, device, paid.values(), count) if paid.keys() & set(stages) else None
    corpus = read_corpus(config.corpus, index=index, count=count)
    scorer = RoundTrip(config.roundtrip, device, logps_of) if SCORE in stages else None
    if scorer:
        scorer.check(corpus.examples)
    if INDUCE in stages:
        run_induce(config.model, config.generation, corpus.examples, paths[INDUCE], device)
    if scorer:
        run_score(scorer, corpus.examples, paths)
    if FILTER in stages and expert:
        min_score = resolve_min_score(config.roundtrip, paths, count)
        run_filter(expert, corpus.examples, paths, min_score=min_score)
    if RESPOND in stages and expert:
        run_respond(expert, corpus.examples, paths)
    if VARY in stages and expert and config.respond.max_same is not None:
        run_vary(expert, kept_pairs(corpus.examples, paths)[1], paths, count, config.respond.max_same)
    if corpus.broken:
        raise UserError(
            f"{corpus.broken}. The {len(corpus.examples)} rows of this shard before it are done and kept; fix the "
            "file and rerun the same command"
        )
    if config.stage == "all" and count == 1:
        merge_shards(config)
    else:
        print(
            f"shard {index} of {count}: {', '.join(stages)} done, {len(corpus.examples)} rows. When all stages of all "
            "shards are done (with respond.max_same, stage=vary too), run the command once with stage=merge."
        )


def _stages(config: InduceConfig, count: int) -> list[str]:
    """Return the stages to run; stage=all includes `vary` only with a single shard, as it needs all responses."""
    if config.stage != "all":
        return [config.stage]
    optional = {
        SCORE: config.roundtrip.model.name_or_path != MISSING,
        VARY: config.respond.max_same is not None and count == 1,
    }
    return [stage for stage in STAGES if optional.get(stage, True)]


def logps_of(model: Any) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
    """Return a function that maps a micro-batch to its responses' log-probabilities, using the training kernel."""
    from trainers.kernels.head_check import check_head  # only stage=score needs the kernels
    from trainers.kernels.logps import sequence_logps

    check_head(model)
    return lambda batch: sequence_logps(model, batch)[0]


def merge_shards(config: InduceConfig) -> None:
    """Write the dataset, its report and its card from the ledgers of all shards."""
    from safer_instruct.dataset.card import build_report, write_report  # imports matplotlib, which no shard needs
    from safer_instruct.dataset.tables import funnel_table

    started = time.monotonic()
    output = Path(config.output)
    excluded = set(read_instruction_keys(config.exclude))
    ledgers = find_ledgers(output / "ledger")
    if config.respond.max_same is not None and VARY not in ledgers:
        raise UserError(
            f"respond.max_same={config.respond.max_same}: no ledger of stage=vary in {output / 'ledger'}; run it in "
            "all shards before stage=merge, or leave respond.max_same out"
        )
    rejections = read_rejections(config.reviews)
    with lock_output(output):  # held until the report is written, so that it describes the dataset beside it
        merged = merge(
            config.corpus,
            ledgers,
            output,
            guard=LeakageGuard(excluded, config.exclude_similarity),
            duplicates=config.duplicates,
            format=config.format,
            rejections=rejections,
        )
        run = {
            "command": without_password(shlex.join(["python", *sys.orig_argv[1:]])),
            **{name: one for name, one in package_versions().items() if name in ("python", "torch", "transformers")},
            "seconds": round(time.monotonic() - started, 1),
        }
        report = build_report(merged, run=run, rejections=rejections, card=config.card)
        write_report(report, output)
    names = ", ".join(FILES[config.format])
    print(funnel_table(report).markdown)
    print(f"\n{report['num_rows']} pairs in {output} ({names}); counts and drops: {output / 'README.md'}")
    if not report["num_rows"]:
        print("No pair is left: the table `dropped by` in README.md says why.")
    if config.log_text:
        _show(output / FILES[config.format][0])
    if config.push_to_hub:
        from safer_instruct.dataset.card import push_dataset

        print(f"uploaded: {push_dataset(output, config.push_to_hub, FILES[config.format])}")


def run_benign(config: InduceConfig) -> None:
    """Run stage=replay or stage=contrast on one shard; a shard that finds all others done writes the pairs."""
    output, stage = Path(config.output), config.stage
    index, count = resolve_shard(config.shard, os.environ)
    require_own_folder(output / "ledger", stage)
    require_same_shards(output / "ledger", count)
    paths = {name: shard_path(output / "ledger", name, index, count) for name in BENIGN_STAGES[stage]}
    device = pick_device(config.device)
    unsafe = read_unsafe_rows(config.path) if config.path else []
    draws = stage == CONTRAST or config.replay.rejected == "refusal"
    refusals = Refusals(unsafe, str(config.path)) if draws else None  # built now: a dataset without any fails early
    guard = LeakageGuard(read_instruction_keys(config.exclude), config.exclude_similarity)
    if stage == REPLAY:
        known = {turn_keys(row)[-1] for row in unsafe}
        prompts = read_benign(config.benign, config.replay, unsafe=known, excluded=guard.reason)
        generator, configuration = starting_model(config.replay, config.model, config.generation, device)
        run_replay(prompts.of_shard(index, count), paths[REPLAY], generator, configuration)
    else:
        prompts = read_unsafe(unsafe, config.contrast.num_rows)
        expert = _checked_expert(config, device, paths.values(), count)
        run_contrast(expert, prompts.of_shard(index, count), paths)
    records = read_records(output / "ledger", stage, count)
    if missing := num_missing(stage, prompts.examples, records):
        print(f"shard {index} of {count} is done; {missing} of {len(prompts.examples)} rows are left to other shards")
        return
    counts = Counter(prompts.dropped)
    if stage == REPLAY:
        by = "file" if config.replay.answers == "file" else model_name(config.model)
        pairs = replay_pairs(prompts.examples, records[REPLAY], refusals, answered_by=by, counts=counts)
    else:
        assert refusals is not None
        pairs = contrast_pairs(prompts.examples, records, refusals, excluded=guard.reason, counts=counts)
    with lock_output(output, wait_seconds=LOCK_SECONDS):  # shards that finish together write the same bytes
        write_pairs(output, stage, pairs, {"stage": stage, "counts": counts})
    reasons = {reason: number for reason, number in sorted(counts.items()) if number and reason != "pairs"}
    dropped = ", ".join(f"{reason} {number}" for reason, number in reasons.items())
    print(f"{counts['pairs']} pairs in {output / stage}.jsonl; what became of the other rows: {dropped or 'none'}")


def run_audit(config: InduceConfig) -> None:
    """Audit a dataset; with output=FOLDER, also write the report and a cleaned dataset."""
    from safer_instruct.dataset.audit import audit
    from safer_instruct.dataset.audit_report import render_audit, write_audit

    reviews = read_reviews(config.reviews)
    found = measure_reviews(reviews, str(config.path)) if reviews else None
    output = None if config.output == MISSING else Path(config.output)
    excluded = set(read_instruction_keys(config.exclude))
    with nullcontext() if output is None else lock_output(output):
        report = audit(
            str(config.path),
            guard=LeakageGuard(excluded, config.exclude_similarity),
            duplicates=config.duplicates,
            max_same_chosen=config.max_same_chosen,
            output=output,
            format=config.format,
        )
        if found is not None:
            report["reviews"] = found
        if output is not None:
            write_audit(report, output)
    print(render_audit(report))
    if output is not None:
        print(f"\n{output / 'audit.html'}, audit.md, audit.json and figures; the cleaned dataset beside them")


def run_review(config: InduceConfig) -> None:
    """Sample pairs of a dataset for a page on which people judge them."""
    from safer_instruct.dataset.review import write_review  # imports matplotlib

    page = write_review(config.path or config.output, config.corpus, config.review, Path(config.output))
    print(
        f"{page}: open it in a browser. Give the file it exports to stage=audit path=... reviews=[FILE,...], which "
        "measures the precision, and to stage=merge reviews=[FILE,...], which leaves out the rejected pairs."
    )


def _checked_expert(config: InduceConfig, device: torch.device, paid: Collection[Path], count: int) -> Expert:
    if config.expert in (None, MISSING):
        raise UserError(f"stage={config.stage} needs an expert: write expert=rules, expert=local or expert=openai")
    budget = budget_left(config.expert, paid, count) if isinstance(config.expert, OpenAIExpertSettings) else None
    expert = build_expert(config.expert, device, budget)
    expert.check()
    return expert


def _show(path: Path) -> None:
    for _, pair in islice(read_rows(path), NUM_SHOWN):
        for column in ("instruction", "rejected", "chosen"):
            print(f"[{pair['id']}] {column}: {pair[column]}")


if __name__ == "__main__":
    run_command(command, main)
