"""What can be wrong with the values of an induction command."""

from __future__ import annotations

from config.checks import _check_model, check_backend, check_device, check_expert, check_server, missing_values
from config.ranges import at_least, existing_path, one_of, share
from config.settings import (
    MISSING,
    InduceConfig,
    RoundTripSettings,
)

INDUCE_STAGES = ("all", "induce", "score", "filter", "respond", "merge", "status", "audit")


def check_induce(config: InduceConfig) -> list[str]:
    """All errors of an induction command."""
    stage = config.stage
    local = config.generation.backend != "openai"
    needs_model = stage in ("all", "induce") and local
    needs_server = stage in ("all", "induce") and not local
    needs_expert = stage in ("all", "filter", "respond")
    has_roundtrip = config.roundtrip.model.name_or_path != MISSING
    needed = {
        "output": stage != "audit",
        "corpus.": stage not in ("status", "audit"),
        "model.": needs_model,
        "expert": needs_expert,
        "generation.server.": needs_server,
        "roundtrip.": has_roundtrip or stage == "score",
    }
    unused = tuple(key for key, is_needed in needed.items() if not is_needed)
    errors = [
        *(line for line in missing_values(config) if not line.startswith(unused)),
        *one_of("stage", stage, INDUCE_STAGES),
        *one_of("format", config.format, ("all", "jsonl", "parquet")),
        *one_of("corpus.on_bad_row", config.corpus.on_bad_row, ("drop", "error")),
        *existing_path("corpus.path", config.corpus.path),
        *existing_path("exclude", config.exclude),
        *existing_path("path", config.path),
        *at_least("corpus.max_rows", config.corpus.max_rows, 1),
        *at_least("max_same_chosen", config.max_same_chosen, 1),
        *share("exclude_similarity", config.exclude_similarity),
        *share("duplicates.threshold", config.duplicates.threshold),
        *one_of("duplicates.index", config.duplicates.index, ("memory", "disk")),
        *check_device(config.device),
        *_check_induction(config),
        *(_check_model(config.model, "model") if needs_model else []),
        *(check_server(config.generation.server, "generation.server") if needs_server else []),
        *_check_roundtrip(config.roundtrip, has_roundtrip),
        *(check_expert(config.expert) if needs_expert else []),
    ]
    if stage == "audit" and config.path is None:
        errors.append("stage=audit reads a dataset: write path=..., a file or folder with the columns of `si`")
    index, count = config.shard.index, config.shard.count
    errors += at_least("shard.count", count, 1)
    if index is not None and (index < 0 or (count is not None and index >= max(count, 1))):
        last = f"{count - 1}" if count else "shard.count - 1"
        errors.append(f"shard.index={index}: shards are numbered from 0 to {last}")
    return errors


def _check_induction(config: InduceConfig) -> list[str]:
    generation = config.generation
    errors = check_backend(generation) + at_least("generation.num_candidates", generation.num_candidates, 1)
    several = generation.num_candidates > 1
    if several and config.roundtrip.model.name_or_path == MISSING and config.stage in ("all", "induce", "filter"):
        errors.append(
            f"generation.num_candidates={generation.num_candidates}: the round-trip score chooses among them, so a "
            "forward model is needed: roundtrip.model.name_or_path=FOLDER"
        )
    if several and generation.temperature == 0:
        errors.append(
            f"generation.num_candidates={generation.num_candidates} with generation.temperature=0: all candidates "
            "would be the same; give a temperature, for example generation.temperature=0.7"
        )
    return errors


def _check_roundtrip(roundtrip: RoundTripSettings, has_model: bool) -> list[str]:
    errors = _check_model(roundtrip.model, "roundtrip.model") if has_model else []
    if roundtrip.threshold is not None and not has_model:
        errors.append(
            f"roundtrip.threshold={roundtrip.threshold} needs scores: give roundtrip.model.name_or_path=FOLDER"
        )
    errors += one_of("roundtrip.template", roundtrip.template, ("alpaca", "hh", "plain", "chat"))
    errors += share("roundtrip.top_fraction", roundtrip.top_fraction)
    errors += at_least("roundtrip.max_length", roundtrip.max_length, 2)
    errors += at_least("roundtrip.max_batch_tokens", roundtrip.max_batch_tokens, 1)
    if roundtrip.threshold is not None and roundtrip.top_fraction is not None:
        errors.append(
            f"roundtrip.threshold={roundtrip.threshold}, roundtrip.top_fraction={roundtrip.top_fraction}: two ways to "
            "draw one line, set one of them"
        )
    return errors
