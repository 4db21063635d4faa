"""From a corpus of unsafe responses to a preference dataset: induce -> filter -> respond -> merge.

    python induce.py corpus.path=corpus.jsonl model=tiny model.archive=runs/reverse expert=rules output=data/si

Every stage keeps an append-only ledger in `output/ledger`, so the same command goes on where a killed one stopped. In
a Slurm array each task does its shard (`shard.index`, `shard.count`); `stage=merge` comes after the last.
Settings: config/induce.yaml, config/settings.py (InduceConfig).
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from config.checks import check_induce
from config.errors import UserError
from config.schema import run_entrypoint
from config.settings import MISSING, InduceConfig, ModelSettings, ShardSettings
from safer_instruct.card import build_report, render_funnel, write_report
from safer_instruct.corpus import read_corpus
from safer_instruct.examples import Example, read_rows
from safer_instruct.experts import Expert, build_expert
from safer_instruct.generation import HFGenerator
from safer_instruct.ledger import Ledger, read_ledger, run_stage, shard_count, shard_path
from safer_instruct.merge import MERGE, merge, read_results
from safer_instruct.models import load_causal_lm, load_tokenizer, model_fingerprint
from safer_instruct.prompts import render_reversed
from safer_instruct.stages import (
    FILTER,
    INDUCE,
    RESPOND,
    ROWS_AT_A_TIME,
    STAGES,
    expert_configuration,
    induce_configuration,
    kept,
    stage_filter,
    stage_induce,
    stage_respond,
    with_instructions,
)

NUM_SHOWN = 3  # pairs that log_text=true prints


def main(config: InduceConfig) -> None:
    """Run the stages of one shard, or the merge of all."""
    started = time.monotonic()
    ledgers = Path(config.output) / "ledger"
    if config.stage == MERGE:
        merge_shards(config, started)
        return
    index, count = resolve_shard(config.shard, os.environ)
    require_same_shards(ledgers, count)
    stages = STAGES if config.stage == "all" else (config.stage,)
    device = torch.device(_device(config.device))
    expert = _checked_expert(config, device) if {FILTER, RESPOND} & set(stages) else None
    corpus = read_corpus(config.corpus, index=index, count=count)
    paths = {stage: shard_path(ledgers, stage, index, count) for stage in STAGES}
    if INDUCE in stages:
        run_induce(config, corpus.examples, paths[INDUCE], device)
    if FILTER in stages and expert:
        run_filter(expert, corpus.examples, paths)
    if RESPOND in stages and expert:
        run_respond(expert, corpus.examples, paths)
    if config.stage == "all" and count == 1:
        merge_shards(config, started)
    else:
        print(
            f"shard {index} of {count}: {', '.join(stages)} done, {len(corpus.examples)} rows. When all stages of all "
            "shards are done, run the command once with stage=merge."
        )


def run_induce(config: InduceConfig, examples: Sequence[Example], path: Path, device: torch.device) -> None:
    """Let the reversed model write the instructions that the ledger lacks; it is loaded if there are any."""
    name = _model_name(config.model)
    fingerprint = model_fingerprint(config.model)
    with Ledger(path, induce_configuration(name, fingerprint, config.generation)) as ledger:
        if all(example.id in ledger.records for example in examples):
            return
        tokenizer = load_tokenizer(config.model)
        model = load_causal_lm(config.model)
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
        generator = HFGenerator(model, tokenizer, config.generation, name=name, fingerprint=fingerprint)
        generator.require_room(render_reversed(""))
        with _progress(INDUCE, examples) as bar:
            run_stage(examples, ledger, stage_induce(generator), batch_size=ROWS_AT_A_TIME, progress=bar.update)


def run_filter(expert: Expert, examples: Sequence[Example], paths: Mapping[str, Path]) -> None:
    """Screen the induced pairs that the ledger lacks."""
    before, induced = read_ledger(paths[INDUCE])
    pairs = with_instructions(examples, induced)
    with Ledger(paths[FILTER], expert_configuration(expert, before)) as ledger, _progress(FILTER, pairs) as bar:
        run_stage(pairs, ledger, stage_filter(expert), batch_size=ROWS_AT_A_TIME, progress=bar.update)


def run_respond(expert: Expert, examples: Sequence[Example], paths: Mapping[str, Path]) -> None:
    """Have the kept instructions answered that the ledger lacks."""
    _, induced = read_ledger(paths[INDUCE])
    before, verdicts = read_ledger(paths[FILTER])
    pairs = kept(with_instructions(examples, induced), verdicts)
    with Ledger(paths[RESPOND], expert_configuration(expert, before)) as ledger, _progress(RESPOND, pairs) as bar:
        run_stage(pairs, ledger, stage_respond(expert), batch_size=ROWS_AT_A_TIME, progress=bar.update)


def merge_shards(config: InduceConfig, started: float) -> None:
    """Write dataset, report and card from the ledgers of all shards."""
    output = Path(config.output)
    results = read_results(output / "ledger")
    corpus = read_corpus(config.corpus)
    funnel = merge(corpus, results, output, exclude=config.exclude, format=config.format)
    run = {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.monotonic() - started, 1),
    }
    report = build_report(corpus, results, funnel, run=run)
    write_report(report, output)
    print(render_funnel(report))
    print(f"\n{report['num_rows']} pairs in {output / f'si.{config.format}'}; counts and drops: {output / 'README.md'}")
    if not report["num_rows"]:
        print("No pair is left: the table `dropped by` in README.md tells why.")
    if config.log_text:
        _show(output / f"si.{config.format}")


def resolve_shard(settings: ShardSettings, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return (index, count) of the shard: as given, else from Slurm's array variables, else the whole.

    `--array=1-10` makes shards 0 to 9 of 10. Where `shard.count` differs from the size of the array (some tasks run
    once more: `--array=3,7 ... shard.count=10`), the task's number is the index itself.

    Raises:
        UserError: An index that is missing or out of range.
    """
    array = {
        name: int(environment[f"SLURM_ARRAY_TASK_{name}"])
        for name in ("ID", "COUNT", "MIN", "STEP")
        if environment.get(f"SLURM_ARRAY_TASK_{name}", "").isdigit()
    }
    count = settings.count if settings.count is not None else array.get("COUNT", 1)
    index = settings.index
    if index is None and "ID" in array:
        whole_array = count == array.get("COUNT", count)
        index = (array["ID"] - array.get("MIN", 0)) // array.get("STEP", 1) if whole_array else array["ID"]
    if index is None and count > 1:
        raise UserError(f"shard.count={count}: which of the shards? Give shard.index=0 to {count - 1}")
    if not 0 <= (index or 0) < count:
        raise UserError(
            f"shard.index={index} is out of range: of {count} shard{'s' * (count > 1)} the indices are 0 to {count - 1}"
            + ("; give shard.count too" if settings.count is None else "")
        )
    return index or 0, count


def require_same_shards(ledgers: Path, count: int) -> None:
    """Refuse to mix shards of different sizes in one output: part of the rows would be computed, and paid, again."""
    before = shard_count(ledgers)
    if before not in (None, count):
        raise UserError(
            f"{ledgers} holds ledgers for {before} shards, and this command works on shard.count={count}: give "
            f"shard.count={before} (and shard.index), or another output=FOLDER"
        )


def _checked_expert(config: InduceConfig, device: torch.device) -> Expert:
    if config.expert in (None, MISSING):
        raise UserError(f"stage={config.stage} needs an expert: write expert=rules, expert=local or expert=openai")
    expert = build_expert(config.expert, device)
    expert.check()
    return expert


def _model_name(settings: ModelSettings) -> str:
    """Return the last parts of the paths: a dataset that is passed on must not tell about the user's machine."""
    name = Path(settings.name_or_path).name
    return f"{name}@{Path(settings.archive).name}" if settings.archive else name


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _progress(stage: str, examples: Sequence[Any]) -> tqdm:
    # A log file gets a line now and then, a terminal a bar that moves.
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=len(examples), desc=stage, unit="row", mininterval=interval, file=sys.stderr)


def _show(path: Path) -> None:
    for _, row in zip(range(NUM_SHOWN), read_rows(path), strict=False):
        _, pair = row
        for column in ("instruction", "rejected", "chosen"):
            print(f"[{pair['id']}] {column}: {pair[column]}")


if __name__ == "__main__":
    run_entrypoint("induce", InduceConfig, check_induce, main)
