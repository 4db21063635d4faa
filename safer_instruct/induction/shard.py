"""Run the stages of one shard, each of which fills a ledger."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from config.errors import UserError
from config.settings import InductionSettings, ModelSettings, OpenAIExpertSettings, RoundTripSettings
from safer_instruct.experts.expert import Expert
from safer_instruct.generation.backends import build_reversed_model, reversed_model_identity
from safer_instruct.generation.weights import run_config
from safer_instruct.induction import stages
from safer_instruct.induction.ledger import Ledger, Record, read_ledger, run_stage, scan_records
from safer_instruct.induction.ledgers import stage_ledgers
from safer_instruct.induction.stages import FILTER, INDUCE, RESPOND, SCORE, Scorer, Stage
from safer_instruct.text.examples import Example

if TYPE_CHECKING:
    from safer_instruct.generation.pacing import Budget

log = logging.getLogger(__name__)


def run_induce(
    model: ModelSettings, generation: InductionSettings, examples: Sequence[Example], path: Path, device: torch.device
) -> None:
    """Let the reversed model write the instructions missing from the ledger; it is only loaded if there are any."""
    name, fingerprint = reversed_model_identity(model, generation)
    configuration = stages.induce_configuration(name, fingerprint, generation)
    note_other_tuning(model, examples)
    with Ledger(path, configuration, num_rows=len(examples)) as ledger:
        if all(ledger.holds(example.id) for example in examples):
            return
        generator = build_reversed_model(model, generation, device)
        function = stages.stage_induce(generator, generation.num_candidates)
        with show_progress(INDUCE, examples) as update:
            run_stage(examples, ledger, function, batch_size=stages.ROWS_AT_A_TIME, progress=update)


def note_other_tuning(model: ModelSettings, examples: Sequence[Example]) -> None:
    """Log a note if a run's model was not trained on the kind of prompts that it will get."""
    path = model.archive or model.name_or_path
    loss = run_config(path).get("loss", {})
    if loss.get("name", "reverse") != "reverse":
        log.warning(
            "note: %s was trained with loss=%s, but stage=induce uses the prompt of loss=reverse",
            path, loss["name"],
        )  # fmt: skip
    elif loss.get("on") == "first" and any(example.history for example in examples):
        log.warning(
            "note: %s was trained on the first turns of conversations only (loss.on=first), but the corpus has later "
            "ones: train it with loss=reverse loss.on=all", path,
        )  # fmt: skip


def run_score(scorer: Scorer, examples: Sequence[Example], paths: Mapping[str, Path]) -> None:
    """Let the forward model score the candidates missing from the ledger."""
    before, induced = read_ledger(paths[INDUCE])
    pairs = stages.with_instructions(examples, induced)
    complete(paths[SCORE], stages.score_configuration(scorer, before), pairs, stages.stage_score(scorer))


def run_filter(
    expert: Expert, examples: Sequence[Example], paths: Mapping[str, Path], *, min_score: float | None
) -> None:
    """Screen the induced pairs missing from the ledger; `min_score` comes from `resolve_min_score`."""
    before, pairs = _induced_pairs(examples, paths)
    configuration = stages.expert_configuration(expert, before, "screen", **{"roundtrip.min_score": min_score})
    complete(paths[FILTER], configuration, pairs, stages.stage_filter(expert, min_score=min_score))


def run_respond(expert: Expert, examples: Sequence[Example], paths: Mapping[str, Path]) -> None:
    """Let the expert answer the kept instructions missing from the ledger."""
    before, pairs = kept_pairs(examples, paths)
    configuration = stages.expert_configuration(expert, before, "respond")
    complete(paths[RESPOND], configuration, pairs, stages.stage_respond(expert))


def complete(path: Path, configuration: Mapping[str, Any], examples: Sequence[Example], stage: Stage) -> None:
    """Compute the records missing from a ledger, and show the progress."""
    name = path.name.partition("-")[0]
    with Ledger(path, configuration, num_rows=len(examples)) as ledger, show_progress(name, examples) as update:
        run_stage(examples, ledger, stage, batch_size=stages.ROWS_AT_A_TIME, progress=update)


def kept_pairs(examples: Sequence[Example], paths: Mapping[str, Path]) -> tuple[dict[str, Any], list[Example]]:
    """Return the configuration of the filter's ledger, and the pairs that the filter keeps."""
    _, pairs = _induced_pairs(examples, paths)
    before, verdicts = read_ledger(paths[FILTER])
    return before, stages.kept(pairs, verdicts)


def _induced_pairs(examples: Sequence[Example], paths: Mapping[str, Path]) -> tuple[dict[str, Any], list[Example]]:
    """Return what the induced pairs depend on, and the pairs, with their best candidates if they are scored."""
    before, induced = read_ledger(paths[INDUCE])
    scores: dict[str, Record] | None = None
    if paths[SCORE].is_file():
        before, scores = read_ledger(paths[SCORE])
    return before, stages.with_instructions(examples, induced, scores)


def resolve_min_score(roundtrip: RoundTripSettings, paths: Mapping[str, Path], count: int) -> float | None:
    """Return the minimum round-trip score for keeping a pair, over `count` shards; None if there is no minimum.

    Raises:
        UserError: `top_fraction` is set, but not all pairs of all shards have been scored yet.
    """
    if roundtrip.threshold is None and roundtrip.top_fraction is None:
        return None
    read_ledger(paths[SCORE])  # raises if this shard has no scores
    if roundtrip.top_fraction is None:
        return roundtrip.threshold
    ledgers = stage_ledgers(paths[SCORE].parent, SCORE, count)
    if missing := ledgers.num_missing():
        raise UserError(
            f"roundtrip.top_fraction={roundtrip.top_fraction} ranks all pairs, but {missing} have no score yet: finish "
            f"stage=score on all {count} shards"
        )
    scores = [record["scores"][record["best"]] for record in ledgers.by_id().values()]
    return stages.least_score((score for score in scores if score is not None), roundtrip.top_fraction)


@contextmanager
def show_progress(stage: str, examples: Sequence[Any]) -> Iterator[Callable[[int], object]]:
    """Show the progress of a stage: a moving bar on a terminal, an occasional line in a log file."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(examples), desc=stage, unit="row", mininterval=interval, file=sys.stderr) as bar:
        yield bar.update


def budget_left(settings: OpenAIExpertSettings, paid: Collection[Path], count: int) -> Budget:
    """Return this shard's part of the budget, minus what its ledgers record as spent."""
    from safer_instruct.generation.server import budget_of

    budget = budget_of(settings, shards=count)
    for path in paid:
        for record, _ in scan_records(path) if path.is_file() else ():
            budget.count(record.get("cost", 0.0), record.get("tokens", 0))
    return budget
