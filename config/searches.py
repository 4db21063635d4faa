"""Plug-ins of Hydra that run the points of a sweep or choose them, and what a search over ranges needs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator
from typing import Any

from config.rules import Fault, misfit

# Choices of Hydra's own groups that need a plug-in, and its package.
PLUGINS = {
    "slurm": "hydra-submitit-launcher", "joblib": "hydra-joblib-launcher", "optuna": "hydra-optuna-sweeper",
}  # fmt: skip
OVER_REFUSAL = "refusals_eval/benign"  # share of the sampled prompts that should be answered and were declined


def is_installed(package: str) -> bool:
    """Return whether a package is there, without importing it."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def lower_is_better(metric: str) -> bool:
    """Return whether a metric is best when small, as losses and over-refusal are; rewards and accuracies are not."""
    return "loss" in metric or metric.startswith("nll") or metric == OVER_REFUSAL


def check_search(config: Any, ranges: Iterable[str]) -> Iterator[Fault]:
    """Yield what is wrong with a search; `config` is a point's, Hydra's own included, and `ranges` the words with one.

    A search asks after each run how good it was: without a metric it would fail only when the first run has ended.
    """
    if config.hydra.runtime.choices.get("hydra/sweeper") != "optuna":
        for word in ranges:
            yield Fault(word.split("=")[0], f"{word}: a range needs a search: add hydra/sweeper=optuna")
    elif "sweep_metric" not in config:
        yield Fault("hydra/sweeper", "hydra/sweeper=optuna: it searches over runs of train.py, by their metrics")
    elif config.dry_run or config.debug:
        key = "dry_run" if config.dry_run else "debug"
        yield misfit(key, config[key], "it leaves no run whose metric could be read; leave hydra/sweeper=optuna out")
    elif config.sweep_metric is None:
        yield Fault(
            "sweep_metric",
            "hydra/sweeper=optuna: write sweep_metric=METRIC, which an evaluation measures, such as "
            "rewards_eval/accuracies",
        )
    else:
        direction = "minimize" if lower_is_better(config.sweep_metric) else "maximize"
        given = getattr(config.hydra.sweeper.direction, "name", config.hydra.sweeper.direction)
        if given != direction:
            why = f"sweep_metric={config.sweep_metric} is to be {direction[:-1]}ed: write hydra.sweeper.direction="
            yield misfit("hydra.sweeper.direction", given, f"{why}{direction}", "sweep_metric")
