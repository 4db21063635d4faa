"""Refusal rates of an evaluation's samples, and early stopping on over-refusal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from config.searches import OVER_REFUSAL
from config.settings import EarlyStopSettings
from trainers.run.saved import RunProgress


def refusal_rates(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of refusals for each kind of prompt, `refusals_eval/KIND`, over samples that have `refused`."""
    refused: dict[str, list[bool]] = {}
    for sample in samples:
        if "refused" in sample:
            refused.setdefault(sample["kind"], []).append(sample["refused"])
    return {f"refusals_eval/{kind}": sum(flags) / len(flags) for kind, flags in refused.items()}


def is_over(progress: RunProgress, settings: EarlyStopSettings) -> bool:
    """Return whether the last evaluation found more over-refusal than allowed; False before the first step."""
    limit = settings.over_refusal
    return limit is not None and progress.updates > 0 and progress.evaluation.get(OVER_REFUSAL, 0.0) > limit
