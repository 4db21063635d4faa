"""Hydra plug-ins that launch or choose the points of a sweep, and the checks of a search over ranges."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import Any

from config.rules import Fault, misfit

# Choices of Hydra's own groups that need a plug-in -> its package.
PLUGINS = {
    "slurm": "hydra-submitit-launcher", "joblib": "hydra-joblib-launcher", "optuna": "hydra-optuna-sweeper",
}  # fmt: skip
OVER_REFUSAL = "refusals_eval/benign"  # share of the sampled prompts that should be answered and were declined


def is_installed(package: str) -> bool:
    """Tell whether a package is installed, without importing it."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def lower_is_better(metric: str) -> bool:
    """Return whether a metric is best when small, as losses and over-refusal are; rewards and accuracies are not."""
    return "loss" in metric or metric.startswith("nll") or metric == OVER_REFUSAL


def check_search(config: Any, ranges: Iterable[str]) -> Iterator[Fault]:
    """Yield the faults of a search. `config` is a point's, with Hydra's own keys; `ranges` are the words with a range.

    A search needs a metric of each run; without this check it would fail only after the first run has ended.
    """
    if config.hydra.runtime.choices.get("hydra/sweeper") != "optuna":
        for word in ranges:
            yield Fault(word.split("=")[0], f"{word}: a range needs a search: add hydra/sweeper=optuna")
    elif "sweep_metric" not in config:
        yield Fault("hydra/sweeper", "hydra/sweeper=optuna: it can only search over runs of train.py, by their metrics")
    elif config.dry_run or config.debug:
        key = "dry_run" if config.dry_run else "debug"
        yield misfit(key, config[key], "such a run has no metrics to search by; leave hydra/sweeper=optuna out")
    elif config.sweep_metric is None:
        yield Fault(
            "sweep_metric",
            "hydra/sweeper=optuna: write sweep_metric=METRIC, the name of an evaluation metric such as "
            "rewards_eval/accuracies",
        )
    else:
        direction = "minimize" if lower_is_better(config.sweep_metric) else "maximize"
        given = getattr(config.hydra.sweeper.direction, "name", config.hydra.sweeper.direction)
        if given != direction:
            why = f"sweep_metric={config.sweep_metric} must be {direction[:-1]}ed: write hydra.sweeper.direction="
            yield misfit("hydra.sweeper.direction", given, f"{why}{direction}", "sweep_metric")
