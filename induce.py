"""From a corpus of unsafe responses to a preference dataset: induce -> (score ->) filter -> respond -> merge.

    python induce.py corpus.path=corpus.jsonl model=tiny model.archive=runs/reverse expert=rules output=data/si

Every stage keeps an append-only ledger in `output/ledger`, so the same command goes on where a killed one stopped. In
a Slurm array each task does its shard (`shard.index`, `shard.count`); `stage=merge` comes after the last,
`stage=status` tells how far all are, `stage=audit` looks over a finished dataset (docs/scale.md).
Settings: config/induce.yaml, config/settings.py (InduceConfig).
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tqdm import tqdm

from config.checks import check_induce
from config.errors import UserError
from config.schema import run_entrypoint
from config.settings import MISSING, InduceConfig, OpenAIExpertSettings
from safer_instruct.backends import build_reversed_model, reversed_model_identity
from safer_instruct.corpus import read_corpus
from safer_instruct.dataset_files import FILES
from safer_instruct.examples import Example, read_rows
from safer_instruct.experts import Expert, build_expert
from safer_instruct.ledger import (
    Ledger,
    Record,
    header_rows,
    read_ledger,
    run_stage,
    scan_records,
    shard_count,
    shard_path,
)
from safer_instruct.merge import MERGE, find_ledgers, merge, read_instructions, stage_ledgers
from safer_instruct.scoring import RoundTrip
from safer_instruct.shards import resolve_shard
from safer_instruct.similarity import LeakageGuard
from safer_instruct.stages import (
    FILTER,
    INDUCE,
    REQUIRED_STAGES,
    RESPOND,
    ROWS_AT_A_TIME,
    SCORE,
    STAGES,
    expert_configuration,
    induce_configuration,
    kept,
    least_score,
    score_configuration,
    stage_filter,
    stage_induce,
    stage_respond,
    stage_score,
    with_instructions,
)

if TYPE_CHECKING:
    from safer_instruct.pacing import Budget

NUM_SHOWN = 3  # pairs that log_text=true prints


def main(config: InduceConfig) -> None:
    """Run the stages of one shard, or the merge of all, or look at what there is."""
    if config.stage == MERGE:
        merge_shards(config)
    elif config.stage == "status":
        from safer_instruct.status import render_status

        print(render_status(Path(config.output) / "ledger"))
    elif config.stage == "audit":
        run_audit(config)
    else:
        run_shard(config)


def run_shard(config: InduceConfig) -> None:
    """Run the stages of one shard; the dataset is merged where it is the only one."""
    ledgers = Path(config.output) / "ledger"
    index, count = resolve_shard(config.shard, os.environ)
    require_same_shards(ledgers, count)
    with_score = config.roundtrip.model.name_or_path != MISSING
    stages = (STAGES if with_score else REQUIRED_STAGES) if config.stage == "all" else (config.stage,)
    device = torch.device(_device(config.device))
    paths = {stage: shard_path(ledgers, stage, index, count) for stage in STAGES}
    expert = _checked_expert(config, device, paths, count) if {FILTER, RESPOND} & set(stages) else None
    corpus = read_corpus(config.corpus, index=index, count=count)
    if INDUCE in stages:
        run_induce(config, corpus.examples, paths[INDUCE], device)
    if SCORE in stages:
        run_score(config, corpus.examples, paths, device)
    if FILTER in stages and expert:
        run_filter(config, expert, corpus.examples, paths, count)
    if RESPOND in stages and expert:
        run_respond(expert, corpus.examples, paths)
    if corpus.broken:
        raise UserError(
            f"{corpus.broken}. The {len(corpus.examples)} rows of this shard before it are done and kept; mend the "
            "file, and give the same command"
        )
    if config.stage == "all" and count == 1:
        merge_shards(config)
    else:
        print(
            f"shard {index} of {count}: {', '.join(stages)} done, {len(corpus.examples)} rows. When all stages of all "
            "shards are done, run the command once with stage=merge."
        )


def run_induce(config: InduceConfig, examples: Sequence[Example], path: Path, device: torch.device) -> None:
    """Let the reversed model write the instructions that the ledger lacks; it is loaded if there are any."""
    name, fingerprint = reversed_model_identity(config.model, config.generation)
    configuration = induce_configuration(name, fingerprint, config.generation)
    with Ledger(path, configuration, num_rows=len(examples)) as ledger:
        if all(example.id in ledger.records for example in examples):
            return
        generator = build_reversed_model(config.model, config.generation, device)
        function = stage_induce(generator, config.generation.num_candidates)
        with _progress(INDUCE, examples) as update:
            run_stage(examples, ledger, function, batch_size=ROWS_AT_A_TIME, progress=update)


def run_score(
    config: InduceConfig, examples: Sequence[Example], paths: Mapping[str, Path], device: torch.device
) -> None:
    """Let the forward model score the candidates that the ledger lacks."""
    before, induced = read_ledger(paths[INDUCE])
    pairs = with_instructions(examples, induced)
    scorer = RoundTrip(config.roundtrip, device)
    configuration = score_configuration(scorer, before)
    with Ledger(paths[SCORE], configuration, num_rows=len(pairs)) as ledger, _progress(SCORE, pairs) as update:
        run_stage(pairs, ledger, stage_score(scorer), batch_size=ROWS_AT_A_TIME, progress=update)


def run_filter(
    config: InduceConfig, expert: Expert, examples: Sequence[Example], paths: Mapping[str, Path], count: int
) -> None:
    """Screen the induced pairs that the ledger lacks."""
    before, pairs = _induced_pairs(examples, paths)
    min_score = resolve_min_score(config, paths, count)
    configuration = expert_configuration(expert, before, FILTER, **{"roundtrip.min_score": min_score})
    function = stage_filter(expert, min_score=min_score)
    with Ledger(paths[FILTER], configuration, num_rows=len(pairs)) as ledger, _progress(FILTER, pairs) as update:
        run_stage(pairs, ledger, function, batch_size=ROWS_AT_A_TIME, progress=update)


def run_respond(expert: Expert, examples: Sequence[Example], paths: Mapping[str, Path]) -> None:
    """Have the kept instructions answered that the ledger lacks."""
    _, pairs = _induced_pairs(examples, paths)
    before, verdicts = read_ledger(paths[FILTER])
    pairs = kept(pairs, verdicts)
    configuration = expert_configuration(expert, before, RESPOND)
    with Ledger(paths[RESPOND], configuration, num_rows=len(pairs)) as ledger, _progress(RESPOND, pairs) as update:
        run_stage(pairs, ledger, stage_respond(expert), batch_size=ROWS_AT_A_TIME, progress=update)


def _induced_pairs(examples: Sequence[Example], paths: Mapping[str, Path]) -> tuple[dict[str, Any], list[Example]]:
    """Return what the pairs depend on, and the pairs: with their best candidates where they have been scored."""
    before, induced = read_ledger(paths[INDUCE])
    scores: dict[str, Record] | None = None
    if paths[SCORE].is_file():
        before, scores = read_ledger(paths[SCORE])
    return before, with_instructions(examples, induced, scores)


def resolve_min_score(config: InduceConfig, paths: Mapping[str, Path], count: int) -> float | None:
    """Return the least round-trip score of a pair that is kept; None: any.

    Raises:
        UserError: `top_fraction` is asked for, and not all pairs of all shards have been scored yet.
    """
    roundtrip = config.roundtrip
    if roundtrip.threshold is None and roundtrip.top_fraction is None:
        return None
    read_ledger(paths[SCORE])  # this shard's must be there in any case
    if roundtrip.top_fraction is None:
        return roundtrip.threshold
    ledgers = stage_ledgers(paths[SCORE].parent, SCORE, count)
    records = [record for record, _ in ledgers.records()]
    num_rows = sum(header_rows(path) for path in ledgers.paths)
    if len(records) < num_rows:
        raise UserError(
            f"roundtrip.top_fraction={roundtrip.top_fraction} is of all pairs, and {num_rows - len(records)} of "
            f"{num_rows} have no score yet: run stage=score of all {count} shards to its end before stage=filter"
        )
    scores = [record["scores"][record["best"]] for record in records]
    return least_score((score for score in scores if score is not None), roundtrip.top_fraction)


def merge_shards(config: InduceConfig) -> None:
    """Write dataset, report and card from the ledgers of all shards."""
    from safer_instruct.card import build_report, render_funnel, write_report  # matplotlib, which no shard needs

    started = time.monotonic()
    output = Path(config.output)
    excluded = read_instructions(config.exclude) if config.exclude else set()
    merged = merge(
        config.corpus,
        find_ledgers(output / "ledger"),
        output,
        guard=LeakageGuard(excluded, config.exclude_similarity),
        duplicates=config.duplicates,
        format=config.format,
    )
    run = {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.monotonic() - started, 1),
    }
    report = build_report(merged, run=run)
    write_report(report, output)
    names = ", ".join(FILES[config.format])
    print(render_funnel(report))
    print(f"\n{report['num_rows']} pairs in {output} ({names}); counts and drops: {output / 'README.md'}")
    if not report["num_rows"]:
        print("No pair is left: the table `dropped by` in README.md tells why.")
    if config.log_text:
        _show(output / FILES[config.format][0])
    if config.push_to_hub:
        from safer_instruct.hub import push_dataset

        print(f"uploaded: {push_dataset(output, config.push_to_hub, FILES[config.format])}")


def run_audit(config: InduceConfig) -> None:
    """Look over a dataset; with output=FOLDER the report is written, and a dataset without what was found if asked."""
    from safer_instruct.audit import audit, render_audit, write_audit

    output = None if config.output == MISSING else Path(config.output)
    excluded = read_instructions(config.exclude) if config.exclude else set()
    report = audit(
        str(config.path),
        guard=LeakageGuard(excluded, config.exclude_similarity),
        duplicates=config.duplicates,
        max_same_chosen=config.max_same_chosen,
        output=output,
        format=config.format,
    )
    print(render_audit(report))
    if output is not None:
        write_audit(report, output)
        print(f"\n{output / 'audit.md'}, audit.json and figures; the cleaned dataset beside them")


def require_same_shards(ledgers: Path, count: int) -> None:
    """Refuse to mix shards of different sizes in one output: part of the rows would be computed, and paid, again."""
    before = shard_count(ledgers)
    if before not in (None, count):
        raise UserError(
            f"{ledgers} holds ledgers for {before} shards, and this command works on shard.count={count}: give "
            f"shard.count={before} (and shard.index), or another output=FOLDER"
        )


def _checked_expert(config: InduceConfig, device: torch.device, paths: Mapping[str, Path], count: int) -> Expert:
    if config.expert in (None, MISSING):
        raise UserError(f"stage={config.stage} needs an expert: write expert=rules, expert=local or expert=openai")
    budget = _budget(config.expert, paths, count) if isinstance(config.expert, OpenAIExpertSettings) else None
    expert = build_expert(config.expert, device, budget)
    expert.check()
    return expert


def _budget(settings: OpenAIExpertSettings, paths: Mapping[str, Path], count: int) -> Budget:
    """This shard's part of the budget, less what its ledgers say has been spent."""
    from safer_instruct.server import budget_of

    budget = budget_of(settings, shards=count)
    for path in (paths[FILTER], paths[RESPOND]):
        for record, _ in scan_records(path) if path.is_file() else ():
            budget.count(record.get("cost", 0.0), record["tokens"])
    return budget


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _progress(stage: str, examples: Sequence[Any]) -> Iterator[Callable[[int], object]]:
    # A log file gets a line now and then, a terminal a bar that moves.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(examples), desc=stage, unit="row", mininterval=interval, file=sys.stderr) as bar:
        yield bar.update


def _show(path: Path) -> None:
    for _, row in zip(range(NUM_SHOWN), read_rows(path), strict=False):
        _, pair = row
        for column in ("instruction", "rejected", "chosen"):
            print(f"[{pair['id']}] {column}: {pair[column]}")


if __name__ == "__main__":
    run_entrypoint("induce", InduceConfig, check_induce, main)
