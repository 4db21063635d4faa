"""What is minimised: from the log-probabilities of a micro-batch to a sum of losses.

An objective returns *sums* over the units that its loss is a mean of (pairs, sequences or tokens). The trainer divides
by the number of units of the whole global batch, so that the loss and its gradient do not depend on how the batch was
cut into micro-batches.

Letters: B = examples of a micro-batch. A metric's name holds `{split}`, for which the trainer puts train or eval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from config.errors import UserError
from config.settings import DPOSettings, IPOSettings, LikelihoodLossSettings, PreferenceLossSettings
from trainers.data.packing import num_target_tokens
from trainers.losses import dpo_loss, ipo_loss, reward_accuracy
from trainers.run.metrics import MetricSums

# A micro-batch -> log-probabilities and numbers of target tokens of its sequences, as `sequence_logps` under a model.
LogpsOf = Callable[[TensorDict], tuple[Tensor, Tensor]]


@dataclass
class LossOutput:
    """What an objective says about one micro-batch."""

    loss_sum: Tensor  # scalar with gradient: sum over the micro-batch's units
    metrics: dict[str, Tensor]  # name -> (B,) float64, one value an example, detached

    def detached(self, *, counts: bool) -> LossOutput:
        """Drop the graph and, of a pass that does not count, also the loss and the metrics' values: not their names."""
        if counts:
            return LossOutput(self.loss_sum.detach(), self.metrics)
        return LossOutput(torch.zeros_like(self.loss_sum), {name: values[:0] for name, values in self.metrics.items()})

    def is_finite(self) -> Tensor:
        """Tell for each example whether all its metrics are finite: (B,) bool."""
        return torch.stack([values.double() for values in self.metrics.values()]).isfinite().all(dim=0)


class Objective(Protocol):
    """The trainer's view of a loss."""

    needs_reference: bool

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """Return the sum of the losses of one micro-batch, and its metrics."""

    def num_units(self, batch: TensorDict) -> int:
        """Count the units that the loss of this micro-batch, still on the host, sums over."""

    def check_first_batch(self, output: LossOutput, num_tokens: int, dtype: torch.dtype) -> None:
        """Raise a UserError if what must hold before the first step of a fresh run does not.

        Args:
            output: of a micro-batch of the first batch.
            num_tokens: of its longest sequence; rounding grows with it.
            dtype: the coarsest that policy or reference were computed in.
        """


def nats_per_token(logps: Tensor, num_tokens: Tensor) -> Tensor:
    """Return the mean negative log-probability of a token of each sequence; 0 where there are no target tokens."""
    return -logps / num_tokens.clamp(min=1)


class LikelihoodObjective:
    """Maximum likelihood of the target given the prompt: supervised fine-tuning and reversed instruction tuning.

    `sequence_sum`: mean over sequences of -log p(target|prompt), the DPO repo's.
    `token_mean`: mean over the target tokens of the global batch, Alpaca's.
    """

    needs_reference = False

    def __init__(self, settings: LikelihoodLossSettings) -> None:
        self.reduction = settings.reduction

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """Sum -log p over the targets; the two reductions differ only in what the trainer divides by."""
        logps, num_tokens = logps_of(batch)
        detached = logps.detach()
        metrics = {"logps_{split}/chosen": detached, "nll_{split}": nats_per_token(detached, num_tokens)}
        return LossOutput(loss_sum=-logps.sum(), metrics=metrics)

    def num_units(self, batch: TensorDict) -> int:
        """Count sequences, or target tokens."""
        return int(num_target_tokens(batch)) if self.reduction == "token_mean" else len(batch["row"])

    def check_first_batch(self, output: LossOutput, num_tokens: int, dtype: torch.dtype) -> None:
        """Accept any value: a likelihood may begin anywhere."""


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss with its settings filled in, and what it must be while policy and reference are one model."""

    function: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]  # one of `trainers.losses`
    beta: float  # rewards are beta times a log-ratio
    at_zero: float  # the loss of a pair whose log-ratios are 0
    slope: float  # how steeply it changes there with the difference of the log-ratios
    average_logps: bool = False  # of log-probabilities that are means per token of the response, not sums


def _dpo(settings: DPOSettings) -> PreferenceLoss:
    return PreferenceLoss(
        partial(dpo_loss, beta=settings.beta, label_smoothing=settings.label_smoothing),
        beta=settings.beta, at_zero=math.log(2), slope=settings.beta / 2, average_logps=settings.average_logps,
    )  # fmt: skip


def _ipo(settings: IPOSettings) -> PreferenceLoss:
    beta = settings.beta
    return PreferenceLoss(
        partial(ipo_loss, beta=beta),
        beta=beta, at_zero=1 / (2 * beta) ** 2, slope=1 / beta, average_logps=settings.average_logps,
    )  # fmt: skip


# Name of a preference loss -> what makes it from its own settings, of which it alone knows what they hold.
LOSSES: dict[str, Callable[[Any], PreferenceLoss]] = {"dpo": _dpo, "ipo": _ipo}

# Nats by which a token's log-probability may differ between two batches of different shape.
TOLERANCE_PER_TOKEN = {torch.float64: 1e-9, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class PreferenceObjective:
    """A preference loss on the log-ratios of chosen and rejected, against cached reference log-probabilities.

    loss = one of LOSSES + nll_weight x (nats per token of chosen). The second term is the one of Pang et al. 2024
    (iterative reasoning preference optimization, eq. 1).
    """

    def __init__(self, settings: PreferenceLossSettings) -> None:
        """Take the group `loss`; its `name` is one of LOSSES."""
        self.name, self.nll_weight = settings.name, settings.nll_weight
        self.loss = LOSSES[settings.name](settings)
        self.needs_reference = not settings.reference_free

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """Run chosen and rejected in one forward pass: B rows -> log-probabilities (B, 2)."""
        logps, num_tokens = logps_of(batch)
        policy, reference = logps, torch.zeros_like(logps)
        if self.needs_reference:
            columns = [batch["reference_chosen_logps"], batch["reference_rejected_logps"]]
            reference = torch.stack(columns, dim=-1).to(logps)
        if self.loss.average_logps:
            policy, reference = policy / num_tokens.clamp(min=1), reference / num_tokens.clamp(min=1)
        losses, chosen_rewards, rejected_rewards = self.loss.function(*policy.unbind(-1), *reference.unbind(-1))
        nll = nats_per_token(logps[:, 0], num_tokens[:, 0])
        total = losses + self.nll_weight * nll if self.nll_weight else losses
        metrics = {
            "rewards_{split}/chosen": chosen_rewards,
            "rewards_{split}/rejected": rejected_rewards,
            "rewards_{split}/accuracies": reward_accuracy(chosen_rewards, rejected_rewards),
            "rewards_{split}/margins": chosen_rewards - rejected_rewards,
            "logps_{split}/chosen": logps[:, 0].detach(),
            "logps_{split}/rejected": logps[:, 1].detach(),
            "preference_loss_{split}": losses.detach(),
            "nll_{split}": nll.detach(),
        }
        return LossOutput(loss_sum=total.sum(), metrics=metrics)

    def num_units(self, batch: TensorDict) -> int:
        """Count pairs."""
        return len(batch["row"])

    def check_first_batch(self, output: LossOutput, num_tokens: int, dtype: torch.dtype) -> None:
        """Require rewards of 0 and the loss that goes with them: before the first step the policy is the reference.

        Raises:
            UserError: with the largest reward, the tolerance, and what may have gone wrong.
        """
        if not self.needs_reference:
            return
        beta, expected = self.loss.beta, self.loss.at_zero
        tokens = 1 if self.loss.average_logps else num_tokens
        tolerance = max(1e-5 if dtype == torch.float32 else 0.0, beta * TOLERANCE_PER_TOKEN[dtype] * tokens)
        # Both rewards may be off by the tolerance; the loss reads the difference of the log-ratios, rewards / beta.
        loss_tolerance = self.loss.slope * 2 * tolerance / beta
        rewards = torch.stack([output.metrics["rewards_{split}/chosen"], output.metrics["rewards_{split}/rejected"]])
        largest = rewards.abs().max().item()
        loss = output.metrics["preference_loss_{split}"].mean().item()
        if largest <= tolerance and abs(loss - expected) <= loss_tolerance:  # a NaN fails, too
            return
        raise UserError(
            f"before the first step the policy is the reference, so every reward must be 0 (at most {tolerance:.1g} "
            f"for {dtype}) and the {self.name} loss {expected:.6f}; the largest reward is {largest:.3g} and the "
            f"loss {loss:.6f}. Either policy and reference run differently (model.reference_dtype other than "
            "model.policy_dtype, a dropout that is not 0), or the reference cache is not of these weights and rows: "
            "delete the folder `reference` in the cache directory (local_dirs) and start again."
        )


def build_objective(settings: Any) -> Objective:
    """Return what `loss=` names, from the settings of that loss."""
    return PreferenceObjective(settings) if settings.name in LOSSES else LikelihoodObjective(settings)


def add_metrics(sums: MetricSums, split: str, outputs: list[LossOutput], loss_sum: Tensor, num_units: float) -> None:
    """Add the loss by its units, and every other metric by its examples."""
    sums.add(f"loss/{split}", loss_sum, num_units)
    for output in outputs:
        for name, values in output.metrics.items():
            sums.add(name.format(split=split), values.double().sum(), values.numel())
