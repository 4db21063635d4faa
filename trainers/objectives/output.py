"""What an objective says about a micro-batch, and what the trainer expects of an objective.

An objective returns *sums* over the units that its loss is a mean of (pairs, answers, sequences or tokens). The trainer
divides by the number of units of the whole global batch, so that the loss and its gradient do not depend on how the
batch was cut into micro-batches.

Letters: B = examples of a micro-batch. A metric's name holds `{split}`, for which the trainer puts train or eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from tensordict import TensorDict
from torch import Tensor

from config.errors import UserError
from config.settings import TrainConfig
from trainers.distributed.layout import Layout
from trainers.losses.responses import LogpsOf
from trainers.run.metrics import MetricSums

# Nats by which a token's log-probability may differ between two batches of different shape.
TOLERANCE_PER_TOKEN = {torch.float64: 1e-9, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class NotFiniteError(UserError):
    """A step whose loss or gradient is not finite, where the run is to stop before it."""


def not_finite_step(named: list[str], are_known: bool, examples: int, loss: float, grad_norm: float) -> NotFiniteError:
    """Make the error that names the examples of such a step: those whose own losses show it, if there are any."""
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return NotFiniteError(
        f"the step after {examples} examples is not finite: loss {loss:.3g}, gradient norm {grad_norm:.3g}; "
        f"{'examples' if are_known else 'one or more of the examples'} {', '.join(named[:8])}{more}. It was not taken. "
        "Lower lr or max_grad_norm (with another exp_name), use model.policy_dtype=float32, or go on without such "
        "steps: the same command with on_non_finite=skip."
    )


@dataclass
class LossOutput:
    """What an objective says about one micro-batch."""

    loss_sum: Tensor  # scalar with gradient: sum over the micro-batch's units
    metrics: dict[str, Tensor]  # name -> (B,) float64, one value an example, detached
    some: dict[str, Tensor] = field(default_factory=dict)  # likewise, of those examples that have such a value

    def detached(self, *, counts: bool) -> LossOutput:
        """Drop the graph and, of a pass that does not count, also the loss and the metrics' values: not their names."""
        if counts:
            return LossOutput(self.loss_sum.detach(), self.metrics, self.some)
        metrics, some = ({name: values[:0] for name, values in one.items()} for one in (self.metrics, self.some))
        return LossOutput(torch.zeros_like(self.loss_sum), metrics, some)

    def is_finite(self) -> Tensor:
        """Tell for each example whether all its metrics are finite: (B,) bool."""
        return torch.stack([values.double() for values in self.metrics.values()]).isfinite().all(dim=0)


class Objective:
    """The trainer's view of a loss; as it stands here, of one whose examples each have a loss of their own."""

    needs_reference = False

    def __init__(self) -> None:
        self.state: dict[str, float] = {}  # numbers that go on from batch to batch; a checkpoint keeps them

    def begin_batch(self, logps_of: LogpsOf, passes: Sequence[tuple[TensorDict, bool]], device: torch.device) -> None:
        """Learn what the losses of a global batch need of all its rows, before the first of them.

        Every process must come here, with as many passes as the others. A training step comes with gradients enabled.
        """

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """Return the sum of the losses of one micro-batch, and its metrics."""
        raise NotImplementedError  # every loss has its own; the other methods suit most of them

    def num_units(self, batch: TensorDict) -> int:
        """Count the units that the loss of this micro-batch, still on the host, sums over."""
        return len(batch["row"])

    def check_first_batch(self, output: LossOutput, num_tokens: int, dtype: torch.dtype) -> None:
        """Raise a UserError if what must hold before the first step of a fresh run does not.

        Args:
            output: of a micro-batch of the first batch.
            num_tokens: of its longest sequence; rounding grows with it.
            dtype: the coarsest that policy or reference were computed in.
        """


def reward_tolerance(beta: float, num_tokens: int, dtype: torch.dtype) -> float:
    """Return how far a reward (beta x a log-ratio over so many tokens) may be from 0 by rounding."""
    return max(1e-5 if dtype == torch.float32 else 0.0, beta * TOLERANCE_PER_TOKEN[dtype] * num_tokens)


def coarsest_dtype(policy_dtype: torch.dtype, settings: TrainConfig, layout: Layout) -> torch.dtype:
    """Return the dtype that rounds most, of what policy and reference are kept in and computed in."""
    model = settings.model
    compute_dtype = model.fsdp_policy_mp if layout.mesh is not None else None
    in_tf32 = "float16" if settings.tf32 and layout.device.type == "cuda" else None  # as many bits
    names = {f"torch.{name}" for name in (model.reference_dtype, compute_dtype, model.autocast, in_tf32)}
    dtypes = [policy_dtype, *(dtype for dtype in TOLERANCE_PER_TOKEN if str(dtype) in names)]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def refuse_start(
    name: str, dtype: torch.dtype, tolerance: float, largest: float, expected: float, loss: float
) -> NoReturn:
    """Raise the UserError of a run whose policy is not its reference before the first step."""
    raise UserError(
        f"before the first step the policy is the reference, so every reward must be 0 (at most {tolerance:.1g} "
        f"for {dtype}) and the {name} loss {expected:.6f}; the largest reward is {largest:.3g} and the "
        f"loss {loss:.6f}. Either policy and reference run differently (model.reference_dtype other than "
        "model.policy_dtype, a dropout that is not 0), or the reference cache is not of these weights and rows: "
        "delete the folder `reference` in the cache directory (local_dirs) and start again."
    )


def add_metrics(sums: MetricSums, split: str, outputs: list[LossOutput], loss_sum: Tensor, num_units: float) -> None:
    """Add the loss by its units, and every other metric by its examples."""
    sums.add(f"loss/{split}", loss_sum, num_units)
    for output in outputs:
        for name, values in (output.metrics | output.some).items():
            sums.add(name.format(split=split), values.double().sum(), values.numel())
