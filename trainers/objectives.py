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
from typing import Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from config.errors import UserError
from config.settings import DPOSettings, IPOSettings, LikelihoodLossSettings, PreferenceLossSettings
from trainers.data.packing import num_target_tokens
from trainers.losses import dpo_loss, ipo_loss, reward_accuracy

# A micro-batch -> log-probabilities and numbers of target tokens of its sequences, as `sequence_logps` under a model.
LogpsOf = Callable[[TensorDict], tuple[Tensor, Tensor]]


@dataclass
class LossOutput:
    """What an objective says about one micro-batch."""

    loss_sum: Tensor  # scalar with gradient: sum over the micro-batch's units
    metrics: dict[str, Tensor]  # name -> (B,) float64, one value an example, detached


class Objective(Protocol):
    """The trainer's view of a loss."""

    needs_reference: bool

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """The sum of the losses of one micro-batch, and its metrics."""

    def num_units(self, batch: TensorDict) -> Tensor:
        """How many units the loss of this micro-batch sums over: a scalar, int64, on the batch's device."""

    def check_first_batch(self, output: LossOutput, num_tokens: int, dtype: torch.dtype) -> None:
        """Called once, before the first step of a fresh run; raises UserError if what must hold then does not."""


def nats_per_token(logps: Tensor, num_tokens: Tensor) -> Tensor:
    """Mean negative log-probability of a token of each sequence; 0 for a sequence without target tokens."""
    return -logps / num_tokens.clamp(min=1)


class LikelihoodObjective:
    """Maximum likelihood of the target given the prompt: supervised fine-tuning and reversed instruction tuning.

    `sequence_sum`: mean over sequences of -log p(target|prompt), the DPO repo's.
    `token_mean`: mean over the target tokens of the global batch, Alpaca's.
    """

    needs_reference = False

    def __init__(self, settings: LikelihoodLossSettings) -> None:
        """Takes `loss.reduction`."""
        self.reduction = settings.reduction

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """-sum of log-probabilities; the two reductions differ only in what the trainer divides by."""
        logps, num_tokens = logps_of(batch)
        detached = logps.detach()
        metrics = {"logps_{split}/chosen": detached, "nll_{split}": nats_per_token(detached, num_tokens)}
        return LossOutput(loss_sum=-logps.sum(), metrics=metrics)

    def num_units(self, batch: TensorDict) -> Tensor:
        """Sequences, or target tokens."""
        if self.reduction == "token_mean":
            return num_target_tokens(batch)
        return torch.tensor(len(batch["row"]), device=batch["row"].device)

    def check_first_batch(self, output: LossOutput, num_tokens: int, dtype: torch.dtype) -> None:
        """A likelihood may begin anywhere."""


# Nats by which a token's log-probability may differ between two batches of different shape.
TOLERANCE_PER_TOKEN = {torch.float64: 1e-9, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class PreferenceObjective:
    """A preference loss on the log-ratios of chosen and rejected, against cached reference log-probabilities.

    loss = dpo or ipo + nll_weight x (nats per token of chosen). The second term is the one of Pang et al. 2024
    (iterative reasoning preference optimization, eq. 1).
    """

    def __init__(self, settings: PreferenceLossSettings) -> None:
        """Takes the group `loss`: its `name` is dpo or ipo."""
        self.settings = settings
        self.needs_reference = not settings.reference_free

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """Chosen and rejected in one forward pass: B rows -> log-probabilities (B, 2)."""
        settings = self.settings
        logps, num_tokens = logps_of(batch)
        scores = logps
        reference = torch.zeros_like(logps)
        if self.needs_reference:
            columns = [batch["reference_chosen_logps"], batch["reference_rejected_logps"]]
            reference = torch.stack(columns, dim=-1).to(logps)
        if settings.average_logps:
            scores, reference = logps / num_tokens.clamp(min=1), reference / num_tokens.clamp(min=1)
        losses, chosen_rewards, rejected_rewards = self._preference_loss(scores, reference)
        nll = nats_per_token(logps[:, 0], num_tokens[:, 0])
        total = losses + settings.nll_weight * nll if settings.nll_weight else losses
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

    def _preference_loss(self, scores: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        settings = self.settings
        vectors = (scores[:, 0], scores[:, 1], reference[:, 0], reference[:, 1])
        if isinstance(settings, IPOSettings):
            return ipo_loss(*vectors, beta=settings.beta, reference_free=settings.reference_free)
        assert isinstance(settings, DPOSettings)
        return dpo_loss(
            *vectors,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            reference_free=settings.reference_free,
        )

    def num_units(self, batch: TensorDict) -> Tensor:
        """Pairs."""
        return torch.tensor(len(batch["row"]), device=batch["row"].device)

    def check_first_batch(self, output: LossOutput, num_tokens: int, dtype: torch.dtype) -> None:
        """Before the first step the policy is the reference: rewards 0, DPO loss ln 2, IPO loss 1 / (2 beta)^2.

        Args:
            output: of the first micro-batch.
            num_tokens: of its longest sequence; rounding grows with it.
            dtype: of the policy's weights.

        Raises:
            UserError: with the largest reward, the tolerance, and what may have gone wrong.
        """
        if not self.needs_reference:
            return
        settings = self.settings
        tokens = 1 if settings.average_logps else num_tokens
        tolerance = max(1e-5 if dtype == torch.float32 else 0.0, settings.beta * TOLERANCE_PER_TOKEN[dtype] * tokens)
        rewards = torch.stack([output.metrics["rewards_{split}/chosen"], output.metrics["rewards_{split}/rejected"]])
        largest = rewards.abs().max().item()
        if settings.name == "ipo":
            # The slope of the square at its start, 1 / beta, carries the margin's tolerance over to the loss.
            expected, loss_tolerance = 1 / (2 * settings.beta) ** 2, 2 * tolerance / settings.beta**2
        else:
            expected, loss_tolerance = math.log(2), tolerance
        loss = output.metrics["preference_loss_{split}"].mean().item()
        if largest <= tolerance and abs(loss - expected) <= loss_tolerance:  # a NaN fails, too
            return
        raise UserError(
            f"before the first step the policy is the reference, so every reward must be 0 (at most {tolerance:.1g} "
            f"for {dtype}) and the {settings.name} loss {expected:.6f}; the largest reward is {largest:.3g} and the "
            f"loss {loss:.6f}. Either policy and reference run differently (model.reference_dtype other than "
            "model.policy_dtype, a dropout that is not 0), or the reference cache is not of these weights and rows: "
            "delete the folder `reference` in the cache directory (local_dirs) and start again."
        )
