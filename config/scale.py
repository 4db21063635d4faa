"""Settings of work that is spread over processes: shards, and who does them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from config import rules
from config.rules import Count


@dataclass
class ShardSettings:
    """Which part of the corpus this process works on; null: Slurm's array variables, or all of it."""

    index: int | None = None  # number of the part, from 0
    count: Count | None = None  # number of parts


@dataclass
class EngineSettings:
    """Who does the shards: this process its own, or the workers of a Ray cluster all of them."""

    name: Annotated[str, rules.choices("process", "ray")] = "process"
    address: str | None = None  # of a Ray cluster, such as auto; null: RAY_ADDRESS, or else a cluster of this machine
    gpus: Annotated[float, rules.at_least(0)] = 0.0  # of each worker, by which Ray places them
    cpus: Annotated[float, rules.at_least(0)] = 1.0  # likewise
