"""The interface between trainer and objective: `Objective`, and its output for a micro-batch.

An objective returns *sums* over units (pairs, answers, sequences or tokens); its loss is the mean over these. The
trainer divides by the units of the whole global batch, so that the loss and its gradient do not depend on how the batch
was cut into micro-batches.

Letters: B = examples of a micro-batch. A metric's name contains `{split}`, which the trainer replaces by train or eval.
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

# Tolerance in nats for a token's log-probability, which may differ between batches of different shapes.
TOLERANCE_PER_TOKEN = {torch.float64: 1e-9, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class NotFiniteError(UserError):
    """The loss or gradient of a step is not finite, and the run stops before that step."""


def not_finite_step(named: list[str], are_known: bool, examples: int, loss: float, grad_norm: float) -> NotFiniteError:
    """Return the error for such a step. It names the examples whose own losses are not finite, if there are any."""
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return NotFiniteError(
        f"the step after {examples} examples is not finite: loss {loss:.3g}, gradient norm {grad_norm:.3g}; "
        f"{'examples' if are_known else 'one or more of the examples'} {', '.join(named[:8])}{more}. It was not taken. "
        "Lower lr or max_grad_norm (with another exp_name), use model.policy_dtype=float32, or skip such steps: rerun "
        "the same command with on_non_finite=skip."
    )


@dataclass
class LossOutput:
    """The output of an objective for one micro-batch."""

    loss_sum: Tensor  # scalar with gradient: sum over the micro-batch's units
    metrics: dict[str, Tensor]  # name -> (B,) float64, one value per example, detached
    some: dict[str, Tensor] = field(default_factory=dict)  # likewise, for metrics that only some examples have

    def detached(self, *, counts: bool) -> LossOutput:
        """Drop the graph; for a pass that does not count, also drop the loss and all metric values, but keep names."""
        if counts:
            return LossOutput(self.loss_sum.detach(), self.metrics, self.some)
        metrics, some = ({name: values[:0] for name, values in one.items()} for one in (self.metrics, self.some))
        return LossOutput(torch.zeros_like(self.loss_sum), metrics, some)

    def is_finite(self) -> Tensor:
        """Return for each example whether all its metrics are finite: (B,) bool."""
        return torch.stack([values.double() for values in self.metrics.values()]).isfinite().all(dim=0)


class Objective:
    """The trainer's view of a loss. The defaults suit a loss in which each example has its own term."""

    needs_reference = False

    def __init__(self) -> None:
        self.state: dict[str, float] = {}  # numbers kept across batches, and saved in checkpoints

    def begin_batch(self, logps_of: LogpsOf, passes: Sequence[tuple[TensorDict, bool]], device: torch.device) -> None:
        """Compute what the losses need from all rows of a global batch, before its first micro-batch.

        Every process must call it, with the same number of passes. Gradients are enabled in a training step.
        """

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """Return the sum of the losses of one micro-batch, and its metrics."""
        raise NotImplementedError  # specific to each loss; the other methods have defaults

    def num_units(self, batch: TensorDict) -> int:
        """Count the units in the loss of this micro-batch, which is still on the host."""
        return len(batch["row"])

    def check_first_batch(self, output: LossOutput, num_tokens: int, dtype: torch.dtype) -> None:
        """Raise a UserError if the outputs cannot be right for a run before its first step.

        Args:
            output: for a micro-batch of the first batch.
            num_tokens: of its longest sequence; rounding grows with it.
            dtype: the coarsest dtype in which policy or reference were computed.
        """


def reward_tolerance(beta: float, num_tokens: int, dtype: torch.dtype) -> float:
    """Return how far rounding may move a reward (beta x a log-ratio over `num_tokens` tokens) from 0."""
    return max(1e-5 if dtype == torch.float32 else 0.0, beta * TOLERANCE_PER_TOKEN[dtype] * num_tokens)


def coarsest_dtype(policy_dtype: torch.dtype, settings: TrainConfig, layout: Layout) -> torch.dtype:
    """Return the coarsest dtype in which policy and reference are stored or computed."""
    model = settings.model
    compute_dtype = model.fsdp_policy_mp if layout.mesh is not None else None
    in_tf32 = "float16" if settings.tf32 and layout.device.type == "cuda" else None  # as many bits
    names = {f"torch.{name}" for name in (model.reference_dtype, compute_dtype, model.autocast, in_tf32)}
    dtypes = [policy_dtype, *(dtype for dtype in TOLERANCE_PER_TOKEN if str(dtype) in names)]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def refuse_start(
    name: str, dtype: torch.dtype, tolerance: float, largest: float, expected: float, loss: float
) -> NoReturn:
    """Raise the UserError for a run whose policy differs from the reference before the first step."""
    raise UserError(
        f"before the first step the policy is the reference, so every reward must be 0 (at most {tolerance:.1g} "
        f"for {dtype}) and the {name} loss {expected:.6f}; the largest reward is {largest:.3g} and the "
        f"loss {loss:.6f}. Either policy and reference run differently (model.reference_dtype other than "
        "model.policy_dtype, a dropout that is not 0), or the reference cache belongs to other weights or rows: "
        "delete the folder `reference` in the cache directory (local_dirs) and start again."
    )


def add_metrics(sums: MetricSums, split: str, outputs: list[LossOutput], loss_sum: Tensor, num_units: float) -> None:
    """Add the loss, averaged over units, and every other metric, averaged over examples."""
    sums.add(f"loss/{split}", loss_sum, num_units)
    for output in outputs:
        for name, values in (output.metrics | output.some).items():
            sums.add(name.format(split=split), values.double().sum(), values.numel())
