"""`dry_run`: the size of a run and, measured in three real steps, its cost. It leaves nothing behind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from config.settings import TrainConfig
from trainers.data.batching import BatchLoader
from trainers.distributed.layout import Layout
from trainers.estimates import (
    MEASURED,
    Work,
    count_work,
    describe_measured,
    describe_work,
    measure,
    renewal_positions,
)
from trainers.run.progress_line import saying
from trainers.run.run_dir import RunDir
from trainers.trainer import Trainer

LARGE_ON_A_CPU = 1.0  # billions of parameters: training so many without a GPU is probably a mistake
TrainerMaker = Callable[[TrainConfig, BatchLoader, BatchLoader, RunDir], Trainer]


def print_estimate(
    config: TrainConfig, layout: Layout, loaders: list[BatchLoader], *, cut: Mapping[str, int],
    count_parameters: Callable[[], int], make_trainer: TrainerMaker,
) -> None:  # fmt: skip
    """Print what the run would be and, unless `dry_run=data`, what it would take; every process must come here.

    `loaders` are for training and, if anything is held out, evaluation; `cut` counts truncated texts by what was cut;
    `count_parameters` must not load the model; `make_trainer` takes settings, the loaders for training and evaluation,
    and a run directory.
    """
    works = layout.on_main(lambda: [count_work(loader) for loader in loaders])
    if layout.is_main:  # printed now, because the steps may fail
        print(f"{config.exp_name}, from the lengths of its rows:", flush=True)
        print(describe_work(config, loaders, works, cut), flush=True)
    lines: list[str] = []
    if config.dry_run != "data":
        reason = layout.on_main(lambda: _why_no_steps(config, layout, count_parameters))
        lines = [f"no steps were taken: {reason}"] if reason else _steps(config, layout, loaders, works, make_trainer)
    if layout.is_main:
        print(*lines, f"nothing was trained; the run would live in {config.run_dir}", sep="\n", flush=True)


def _steps(
    config: TrainConfig, layout: Layout, loaders: list[BatchLoader], works: list[Work], make_trainer: TrainerMaker
) -> list[str]:
    """Take three steps and return the lines that describe them; `works` belong to `loaders`."""
    first, largest = (loaders[0].excerpt(rows, MEASURED) for rows in (works[0].first, works[0].largest))
    what = f"three real steps, of up to {max(count_work(one).positions for one in (first, largest)):,} positions"
    if layout.is_main:
        print(f"now {what}", file=sys.stderr, flush=True)
    alone = replace(config, debug=True, sample_during_eval=False)  # no checkpoints, no wandb
    with TemporaryDirectory(prefix="dry-run-") as folder, saying(what, active=layout.is_main, always=True):
        trainer = make_trainer(alone, first, largest, RunDir(Path(folder) / "run", None))
        measured = measure(trainer)
    num_positions = 0
    if trainer.objective.needs_reference:  # computed once per row, however many epochs visit it
        for loader, work in zip(loaders, works, strict=True):
            num_positions += work.positions * len(loader.rows_visited()) // work.ends[-1]
    renewed = renewal_positions(config, loaders, works)
    return [
        f"from three real steps ({layout.device.type}, processes: {layout.world_size}):",
        describe_measured(config, works, measured, num_positions, renewed),
    ]


def _why_no_steps(config: TrainConfig, layout: Layout, count_parameters: Callable[[], int]) -> str:
    """Return why the model should not be loaded (this looks like a login node), or "" if it may be."""
    if config.device != "auto" or layout.device.type != "cpu":
        return ""
    billions = count_parameters() / 1e9
    if billions < LARGE_ON_A_CPU:
        return ""
    return (
        f"device=auto found no GPU, and the model has {billions:.1f} billion parameters; run the command on the "
        "training machine, or set device=cpu to measure here"
    )
