"""Run an induction over all shards, on the workers of an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from config.settings import EngineSettings, InduceConfig, ShardSettings
from safer_instruct.engine_ray import run_on_ray
from safer_instruct.induction.stages import FILTER, INDUCE, RESPOND, SCORE, VARY
from safer_instruct.induction.status import live_line


def spread_stages(config: InduceConfig, run_shard: Callable[[InduceConfig], None]) -> None:
    """Run the stages of all shards on the workers of `run_on_ray`."""
    for stage in waves(config):
        work = partial(_run_one, run_shard, replace(config, stage=stage))
        run_on_ray(work, config.shard.count or 1, config.engine, partial(live_line, Path(config.output) / "ledger"))


def waves(config: InduceConfig) -> list[str]:
    """Return the values of `stage=` to run in order; all shards must finish one before any shard begins the next."""
    if config.stage != "all":
        return [config.stage]
    ranks_all_pairs = config.roundtrip.top_fraction is not None
    stages = [INDUCE, SCORE, FILTER, RESPOND] if ranks_all_pairs else ["all"]
    return [*stages, VARY] if config.respond.max_same is not None else stages


def _run_one(run_shard: Callable[[InduceConfig], None], config: InduceConfig, index: int) -> None:
    run_shard(replace(config, engine=EngineSettings(), shard=ShardSettings(index, config.shard.count)))
