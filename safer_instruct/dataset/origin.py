"""What all rows of a merged dataset have in common: models, decoding, prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safer_instruct.induction.ledgers import StageLedgers
from safer_instruct.induction.stages import FILTER, INDUCE, RESPOND, SCORE


def provenance_of_all(ledgers: Mapping[str, StageLedgers]) -> dict[str, Any]:
    """Return the part of the provenance that all rows share."""
    induced, screened = ledgers[INDUCE].configuration, ledgers[FILTER].configuration
    shared = {
        "reversed_model": induced["model"],
        "reversed_model_fingerprint": induced["model_fingerprint"],
        "reversed_prompt": induced["prompt"],
        **{name: induced[f"generation.{name}"] for name in ("temperature", "top_p", "max_new_tokens", "seed")},
        "num_candidates": induced.get("generation.num_candidates", 1),
    }
    for stage in (FILTER, RESPOND):
        expert = ledgers[stage].configuration
        shared[f"{stage}_expert"] = expert["expert"]
        shared[f"{stage}_expert_fingerprint"] = expert["expert_fingerprint"]
        shared[f"{stage}_prompt"] = expert["expert_prompt"]
    if SCORE in ledgers:
        scored = ledgers[SCORE].configuration
        shared |= {name: scored[name] for name in ("forward_model", "forward_fingerprint")}
        shared["min_round_trip"] = screened.get("roundtrip.min_score")
    return shared
