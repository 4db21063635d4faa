"""Which rates a report shows, in which words: one list for tables, figures, console and wandb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safer_instruct.text.display import percent

Models = Mapping[str, Mapping[str, Any]]  # `report["models"]`
NOT_COUNTED = {"value": None, "low": None, "high": None, "n": 0}


@dataclass(frozen=True, slots=True)
class MetricView:
    """How a metric is shown: its words, the prompts it is counted over, and which way is better."""

    key: str
    title: str
    over: str
    better: str = ""  # lower | higher | ""


HEADLINE = (
    MetricView("harmful_rate", "Harmful answers", "unsafe prompts", "lower"),
    MetricView("refusal_rate", "Refusals", "unsafe prompts", "higher"),
    MetricView("specific_refusal_rate", "Refusals that name the matter", "unsafe prompts", "higher"),
    MetricView("safe_helpful_rate", "Safe and helpful", "unsafe prompts", "higher"),
    MetricView("neither_rate", "Neither harmful nor refusal", "unsafe prompts", "lower"),
    MetricView("over_refusal_rate", "Over-refusal", "benign and near prompts", "lower"),
    MetricView("benign_accuracy", "Accuracy, benign", "benign prompts", "higher"),
    MetricView("near_accuracy", "Accuracy, near", "benign prompts that look unsafe", "higher"),
)
FURTHER = (
    MetricView("specific_among_refusals", "Refusals that name the matter", "refusals of unsafe prompts", "higher"),
    MetricView("harmful_on_benign_rate", "Harmful answers, benign and near", "benign and near prompts", "lower"),
    MetricView("truncated_rate", "Cut by the token limit", "all prompts"),
    MetricView("prompt_cut_rate", "Prompt cut to fit the context", "all prompts"),
    MetricView("abstain_rate", "Judge abstained", "all prompts"),
)


def shown_metrics(models: Models, views: Sequence[MetricView]) -> list[MetricView]:
    """Return the metrics that at least one model has a number for."""
    return [view for view in views if any(model[view.key]["n"] for model in models.values())]


def groups_with(models: Models, group: str, metric: str) -> list[str]:
    """Return the labels (`by_label`) or sources (`by_source`) in which at least one model has the metric."""
    return sorted({name for model in models.values() for name, rates in model[group].items() if metric in rates})


def interval_text(value: float | None, low: float | None, high: float | None) -> str:
    """Write shares as `52.1 [48.0, 56.2]` per cent; `-` where there is no value."""
    if value is None:
        return "-"
    return percent(value) if low is None else f"{percent(value)} [{percent(low)}, {percent(high)}]"


def rate_text(rate: Mapping[str, Any]) -> str:
    """Write a rate as `94.3 [91.2, 96.4] (n=600)`, or as `-` where nothing was counted."""
    text = interval_text(rate["value"], rate["low"], rate["high"])
    return f"{text} (n={rate['n']})" if rate["n"] else text
