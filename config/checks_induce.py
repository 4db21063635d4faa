"""Checks of an induction command."""

from __future__ import annotations

from collections.abc import Iterator

from config.checks import check_device, check_expert, check_hub, check_server, check_spread, unread_by_expert
from config.names import BENIGN_STAGES, STAGES
from config.paths import find_path
from config.rules import MISSING, Fault, check_values, is_below, misfit
from config.settings import JUDGES, InduceConfig


def check_induce(config: InduceConfig) -> list[Fault]:
    """Return all faults of an induction command, except those of settings that its stage does not read."""
    stage, is_local = config.stage, config.generation.backend != "openai"
    induces = stage in ("all", "induce")
    replays = stage == "replay" and config.replay.answers == "model"
    asks_expert = stage in ("all", "filter", "respond", "vary", "contrast")
    needed = {
        "output": stage != "audit",
        "corpus": stage not in ("status", "audit", "review", *BENIGN_STAGES)
        or (stage == "review" and config.review.dropped > 0),
        "benign": stage == "replay",
        "model": replays or (induces and is_local),  # a served starting model still needs its tokenizer
        "expert": asks_expert,
        "generation.server": (induces or replays) and not is_local,
        "roundtrip.model": _has_roundtrip(config) or stage == "score",
    }
    faults = [*check_values(config), *_check_induction(config), *_check_shard(config), *check_hub(config.push_to_hub)]
    faults += check_spread(config, STAGES, elsewhere="" if stage in ("all", *STAGES) else f"stage={stage}")
    if needed["generation.server"]:
        faults += check_server(config.generation.server, "generation.server")
    faults += check_expert(config.expert, "expert")
    if stage == "vary" and config.respond.max_same is None:
        message = "stage=vary needs the largest share of one response: respond.max_same=0.02"
        faults.append(Fault("respond.max_same", message))
    if asks_expert and isinstance(config.expert, JUDGES):
        message = f"expert={config.expert.name} judges answers and writes none; write expert=openai, local or rules"
        faults.append(Fault("expert", message))
    draws = stage == "contrast" or (stage == "replay" and config.replay.rejected == "refusal")
    if (stage == "audit" or draws) and config.path is None:
        message = f"stage={stage} reads a dataset: write path=..., a file or folder with the columns of `si`"
        faults.append(Fault("path", message))
    if config.reviews and stage not in ("audit", "merge"):
        message = f"stage={stage} does not read reviews=...; give them to stage=audit or stage=merge"
        faults.append(Fault("reviews", message))
    if stage == "review" and config.path is None and config.output != MISSING and not find_path(config.output).exists():
        message = f"stage=review draws from a dataset, and output={config.output} holds none: write path=..."
        faults.append(Fault("path", message))
    unread = [key for key, is_needed in needed.items() if not is_needed] + unread_by_expert(config.expert, "expert")
    faults = [fault for fault in faults if not is_below(fault.key, unread)]
    return faults or list(check_device(config.device))


def _has_roundtrip(config: InduceConfig) -> bool:
    return bool(config.roundtrip.model.name_or_path != MISSING)


def _check_shard(config: InduceConfig) -> Iterator[Fault]:
    index, count = config.shard.index, config.shard.count
    if index is not None and (index < 0 or (count is not None and index >= max(count, 1))):
        last = f"{count - 1}" if count else "shard.count - 1"
        yield misfit("shard.index", index, f"shards are numbered from 0 to {last}", "shard.count")


def _check_induction(config: InduceConfig) -> Iterator[Fault]:
    roundtrip, number, key = config.roundtrip, config.generation.num_candidates, "generation.num_candidates"
    if number > 1 and config.stage == "replay":
        yield misfit(key, number, "stage=replay takes one answer per prompt; leave it out")
    if number > 1 and not _has_roundtrip(config) and config.stage in ("all", "induce", "filter"):
        why = "the round-trip score chooses among them: set its forward model, roundtrip.model.name_or_path=FOLDER"
        yield misfit(key, number, why, "roundtrip.model")
    if number > 1 and config.generation.temperature == 0:
        why = "with generation.temperature=0 all would be the same; write a higher one, generation.temperature=0.7"
        yield misfit(key, number, why, "generation.temperature")
    if roundtrip.threshold is not None and not _has_roundtrip(config):
        why = "it needs scores: give roundtrip.model.name_or_path=FOLDER"
        yield misfit("roundtrip.threshold", roundtrip.threshold, why, "roundtrip.model")
    if roundtrip.threshold is not None and roundtrip.top_fraction is not None:
        why = f"roundtrip.top_fraction={roundtrip.top_fraction} is another way to set the limit; set only one of them"
        yield misfit("roundtrip.threshold", roundtrip.threshold, why, "roundtrip.top_fraction")
