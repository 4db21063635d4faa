"""Check a model's implicit rewards on held-out pairs: accuracy, margins and calibration; no text is generated.

The implicit reward of a response is beta (log p(response) - log p_reference(response)) (Rafailov et al. 2023, equation
5 without its term that depends only on the prompt). sigmoid(reward(chosen) - reward(rejected)) is the model's
probability of the preference. A calibrated model is right on 80% of the pairs that it is 80% sure of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from scipy.special import expit

from safer_instruct.measures.rates import rate_of
from safer_instruct.measures.statistics import mean_interval

BINS = 10  # of confidence, from 0.5 to 1


def check_rewards(margins: Sequence[float], labels: Sequence[str]) -> dict[str, Any]:
    """Measure accuracy, margins and calibration of rewards over all pairs, and accuracy and margins by label.

    Args:
        margins: reward(chosen) - reward(rejected) of each pair, in nats.
        labels: Label of each pair; "" if it has none.

    Returns:
        `{accuracy, margin: {mean, low, high}, calibration_error, bins, by_label}`. `accuracy`, with a Wilson interval,
        leaves out ties, which `ties` counts; calibration counts them as half right, as in training.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for margin, label in zip(margins, labels, strict=True):
        groups[label or "(no label)"].append(margin)
    by_label = {label: _summary(values) for label, values in sorted(groups.items())}
    return {**_summary(margins), **_calibration(margins), "by_label": by_label}


def _summary(margins: Sequence[float]) -> dict[str, Any]:
    accuracy = rate_of(margin > 0 if margin else None for margin in margins)
    mean, low, high = mean_interval(margins)
    return {
        "n": len(margins),
        "ties": sum(not margin for margin in margins),
        "accuracy": asdict(accuracy),
        "margin": {"mean": mean, "low": low, "high": high},
    }


def _calibration(margins: Sequence[float]) -> dict[str, Any]:
    """Compute the expected calibration error over `BINS` bins of max(p, 1 - p) (Guo et al. 2017), and the bins."""
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for margin in margins:
        confidence = float(expit(abs(margin)))
        right = 0.5 if margin == 0 else float(margin > 0)
        bins[min(int((confidence - 0.5) * 2 * BINS), BINS - 1)].append((confidence, right))
    rows = [
        {
            "n": len(pairs),
            "confidence": sum(confidence for confidence, _ in pairs) / len(pairs),
            "accuracy": sum(right for _, right in pairs) / len(pairs),
        }
        for _, pairs in sorted(bins.items())
    ]
    error = sum(row["n"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(margins)
    return {"calibration_error": error, "bins": rows}
