"""The size and cost of a run, for `dry_run`: counts from the lengths of the rows, times from real steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from config.console import duration
from config.settings import TrainConfig
from trainers.data.batching import BatchLoader, passes_multiple
from trainers.distributed.layout import gather_objects
from trainers.distributed.preemption import Preempted
from trainers.lora import adapter_of
from trainers.reference import renewal_is_due
from trainers.run.metrics import peak_memory_gib
from trainers.run.state import plain_state
from trainers.trainer import Trainer

T = TypeVar("T")
MEASURED = 2  # micro-batches per process in a timed step: unlike the first, the second adds to an existing gradient


@dataclass(frozen=True)
class Work:
    """The amount of work in all batches of a loader, over all processes."""

    ends: list[int]  # examples seen after each global batch
    microbatches: int  # number of micro-batches
    tokens: int  # in all sequences; the prompt of a pair counts in both
    positions: int  # positions that the model is run on
    padding: float  # share of the positions that are padding
    largest_microbatch: int  # positions of the largest micro-batch
    first: Tensor  # rows of the first global batch, (B,) int64
    largest: Tensor  # rows of the global batch that has the largest micro-batch, (B,) int64


def count_work(loader: BatchLoader) -> Work:
    """Count without making batches (about 20 s for a million rows). The loader must not be empty."""
    plan = list(loader.plan())
    batches = [rows for rows, _ in plan]
    sizes = [[size for own in ranks for size in own] for _, ranks in plan]
    largest = max(range(len(plan)), key=lambda k: max(sizes[k]))
    seen = torch.cat(batches)
    lengths = loader.store.lengths[seen].long()
    tokens = int(lengths[:, 1:].sum() + lengths[:, 0].sum() * (lengths.shape[1] - 1))
    positions = sum(map(sum, sizes))
    return Work(
        ends=torch.tensor([len(rows) for rows in batches]).cumsum(0).tolist(),
        microbatches=sum(map(len, sizes)),
        tokens=tokens,
        positions=positions,
        padding=max(0.0, 1 - tokens / positions),  # a packed position may count as a token of two sequences
        largest_microbatch=max(sizes[largest]),
        first=batches[0],
        largest=batches[largest],
    )


def num_evaluations(ends: Sequence[int], settings: TrainConfig) -> int:
    """Count the evaluations of a run whose steps end at these numbers of examples."""
    return settings.do_first_eval + len(_due_at(ends, settings.eval_every))


def num_checkpoints(ends: Sequence[int], settings: TrainConfig) -> int:
    """Count the checkpoints that a run leaves; `keep_best` keeps the best one in addition to the last ones."""
    checkpoint = settings.checkpoint
    written = 0 if settings.debug else len(_due_at(ends, checkpoint.every_examples or settings.eval_every))
    if checkpoint.keep_last is None:
        return written
    return min(written, checkpoint.keep_last + (checkpoint.keep_best is not None))


def renewals(ends: Sequence[int], settings: TrainConfig) -> list[int]:
    """Return the examples seen at each renewal of the reference (`reference.refresh_examples`)."""
    found = [0]
    for start in [0, *ends[:-1]]:
        if renewal_is_due(start, found[-1], settings.reference.refresh_examples):
            found.append(start)
    return found[1:]


def num_renewed_evaluations(ends: Sequence[int], settings: TrainConfig) -> int:
    """Count the evaluations that must recompute reference rows, because the reference was renewed since the last."""
    renewed = renewals(ends, settings)
    references = {max((at for at in renewed if at < end), default=0) for end in _due_at(ends, settings.eval_every)}
    return len(references - {0})


def renewal_positions(settings: TrainConfig, loaders: Sequence[BatchLoader], works: Sequence[Work]) -> int:
    """Count the positions run for all renewals: for each, the training rows up to the next, and the evaluation rows."""
    ends = works[0].ends
    num_rows = len(loaders[0].rows_visited())  # a reference that lasts for several epochs is computed once per row
    spans = pairwise([*renewals(ends, settings), ends[-1]])
    examples = sum(min(stop - start, num_rows) for start, stop in spans)
    evaluated = num_renewed_evaluations(ends, settings) * sum(one.positions for one in works[1:])
    return works[0].positions * examples // ends[-1] + evaluated


def _due_at(ends: Sequence[int], every: int) -> set[int]:
    """Return the ends of the steps that pass a multiple of `every`, plus the end of the last step."""
    starts = [0, *ends[:-1]]
    return {end for start, end in zip(starts, ends, strict=True) if passes_multiple(start, end, every)} | {ends[-1]}


@dataclass(frozen=True)
class Measured:
    """Measurements of a few real steps."""

    step_seconds: float  # of a step without its optimizer update, per position of its batch over all processes
    update_seconds: float  # of the optimizer update in each step
    forward_seconds: float  # of an evaluation, per position
    peak_memory_gib: float  # maximum over processes
    weights_bytes: int  # in a checkpoint
    optimizer_bytes: int  # likewise


def measure(trainer: Trainer) -> Measured:
    """Take three steps and evaluate; every process must call it. Raises Preempted after a step if asked to stop.

    The trainer must be new and under `debug`. Its training loader is an excerpt (of MEASURED micro-batches) of the
    first global batch of the run; its evaluation loader is one of the batch with the largest micro-batch.
    """
    first, largest, device = trainer.train_loader, trainer.eval_loader, trainer.layout.device
    assert largest is not None
    seconds, updates = 0.0, []
    trainer.optimizer.register_step_pre_hook(lambda *_: updates.append(-_now(device)))
    trainer.optimizer.register_step_post_hook(lambda *_: updates.append(_now(device)))
    # The first step warms up and allocates the optimizer state, so that the largest micro-batch shows the peak memory.
    for loader in (first, largest, first):
        (batch,) = loader.batches()
        batch, trainer.train_loader = replace(batch, start_examples=trainer.progress.examples), loader
        agreed, seconds = _timed(partial(trainer.train_step, batch), device)
        if agreed.stop:
            raise Preempted("stopped as asked; a dry run leaves nothing behind" if trainer.layout.is_main else "")
    forward_seconds = [_timed(trainer.evaluate, device)[1] for _ in range(2)][-1]  # the first one warms up
    weights, optimizer = checkpoint_bytes(trainer)
    return Measured(
        step_seconds=(seconds - sum(updates[-2:])) / count_work(first).positions,
        update_seconds=sum(updates[-2:]),
        forward_seconds=forward_seconds / count_work(largest).positions,
        peak_memory_gib=max(gather_objects(peak_memory_gib(device))),
        weights_bytes=weights,
        optimizer_bytes=optimizer,
    )


def _timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Call `work` and return its result and its seconds, including pending work on the device."""
    started = _now(device)
    return work(), _now(device) - started


def _now(device: torch.device) -> float:
    """Return the time after the device has finished its pending work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def checkpoint_bytes(trainer: Trainer) -> tuple[int, int]:
    """Return the bytes of the weights and of the optimizer state in a checkpoint, over all processes.

    Call it after a step. `checkpoint.policy_pt` counts the model twice. With an adapter, count its weights and, with
    `checkpoint.merge`, the whole model. Tokenizer, random states and headers, about 100 kB, are not counted.
    """
    weights = {id(tensor): tensor for tensor in trainer.policy.state_dict(keep_vars=True).values()}  # tied weights once
    states = tree_leaves([plain_state(state) for state in trainer.optimizer.state.values()])
    checkpoint, adapter = trainer.settings.checkpoint, adapter_of(trainer.policy)
    trained = [] if adapter is None else [one for one in weights.values() if one.requires_grad]
    whole = 0 if trained and not checkpoint.merge else _bytes(weights.values()) - _bytes(trained)
    others = [tensor for tensors in trainer.shards().values() for tensor in tensors.values()]
    return (1 + checkpoint.policy_pt) * whole + _bytes(trained) + _bytes(others), _bytes(
        value for value in states if isinstance(value, Tensor)
    )


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # for a DTensor, of all shards


def describe_work(
    settings: TrainConfig, loaders: Sequence[BatchLoader], works: Sequence[Work], cut: Mapping[str, int]
) -> str:
    """Describe the size of the run in a few lines.

    `loaders` are for training and, if anything is held out, for evaluation, and `works` belong to them; `cut` counts
    truncated texts by what was cut.
    """
    rows, work, limit = [len(loader.store) for loader in loaders], works[0], loaders[0].cutter.max_tokens
    return _table(
        {
            "rows": f"{rows[0]:,} for training, {sum(rows[1:]):,} for evaluation; cut: "
            + ", ".join(f"{number:,} {what}" for what, number in cut.items()),
            "steps": f"{len(work.ends):,} of {settings.batch_size:,} examples: {work.ends[-1]:,} in all, in "
            f"{work.microbatches:,} micro-batches",
            "tokens": f"{work.tokens:,} in {work.positions:,} positions, padding {work.padding:.1%}",
            "micro-batch": f"up to {work.largest_microbatch:,} positions "
            + ("(no limit)" if limit is None else f"(limit {limit:,})"),
        }
    )


def describe_measured(
    settings: TrainConfig,
    works: Sequence[Work],
    measured: Measured,
    reference_positions: int,
    renewed_positions: int = 0,
) -> str:
    """Describe the cost of the run in a few lines.

    `works` are for training and, if anything is held out, for each evaluation; `reference_positions` are those of all
    rows that need reference log-probabilities, 0 if the objective reads none; `renewed_positions` see
    `renewal_positions`.
    """
    work = works[0]
    training = measured.step_seconds * work.positions + measured.update_seconds * len(work.ends)
    reference = measured.forward_seconds * reference_positions
    renewed, num_renewed = measured.forward_seconds * renewed_positions, len(renewals(work.ends, settings))
    evaluation = measured.forward_seconds * sum(one.positions for one in works[1:])
    times = num_evaluations(work.ends, settings) if works[1:] else 0
    size = measured.weights_bytes + measured.optimizer_bytes
    kept = num_checkpoints(work.ends, settings)
    return _table(
        {
            "step": f"{duration(training / len(work.ends))} ({work.positions / training:,.0f} positions/s)",
            "training": duration(training),
            "reference": f"{duration(reference)}, unless it is cached" if reference_positions else "none",
            **({"renewals": f"{duration(renewed)}: {num_renewed} of the reference"} if num_renewed else {}),
            "evaluations": f"{duration(times * evaluation)}: {times} of {duration(evaluation)}, without samples",
            "in all": f"{duration(training + reference + renewed + times * evaluation)}, without loading and saving",
            "memory": f"{measured.peak_memory_gib:.2f} GiB at the peak of a process",
            "checkpoint": f"{_size(size)} (weights {_size(measured.weights_bytes)}, optimizer "
            f"{_size(measured.optimizer_bytes)}); {kept} kept: {_size(kept * size)}",
        }
    )


def _table(lines: Mapping[str, str]) -> str:
    return "\n".join(f"  {name:<13}{text}" for name, text in lines.items())


def _size(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
