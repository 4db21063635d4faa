"""Losses on single answers judged good or bad; a row may also contain another row's answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from config.settings import AnswerLossSettings
from trainers.losses import ANSWER_LOSSES
from trainers.losses.responses import Answers, LogpsOf
from trainers.objectives.output import LossOutput, Objective, refuse_start, reward_tolerance
from trainers.objectives.passes import ForwardPasses, Responses


class AnswerObjective(Objective):
    """The mean of one of ANSWER_LOSSES over single answers, against cached reference log-probabilities.

    z0 estimates the KL divergence from the reference: max(0, mean over the global batch of
    log pi/ref (another row's answer | prompt)), without gradient (Ethayarajh et al. 2024, section 4.1).
    """

    needs_reference = True

    def __init__(self, settings: AnswerLossSettings) -> None:
        """Take the config group `loss`, for a loss on single answers."""
        super().__init__()
        self.settings = settings
        self.passes = ForwardPasses(needs_reference=True)
        self._whole: Responses | None = None

    def begin_batch(self, logps_of: LogpsOf, passes: Sequence[tuple[TensorDict, bool]], device: torch.device) -> None:
        """Run the whole batch first, if the loss uses z0."""
        if self.settings.mismatched:
            self._whole = self.passes.whole_batch(logps_of, passes, device)

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """Run the row's own answer and another row's in one forward pass: B rows -> log-probabilities (B, 1 or 2)."""
        own = self.passes(logps_of, batch)
        ratios, is_good = own.policy - own.reference, batch["is_good"]
        divergence = torch.zeros_like(ratios[0, 0])
        if self.settings.mismatched:
            whole = self._whole or own.detached()
            divergence = (whole.policy - whole.reference)[:, 1].mean().clamp(min=0)
        losses = ANSWER_LOSSES[self.settings.name](Answers(ratios[:, 0], is_good, divergence), self.settings)
        rewards = self.settings.beta * ratios.detach()[:, 0]
        metrics = {
            "rewards_{split}/signed": torch.where(is_good, rewards, -rewards),
            "preference_loss_{split}": losses.detach(),
        }
        if self.settings.mismatched:
            metrics["kl_{split}"] = ratios.detach()[:, 1]
        return LossOutput(losses.sum(), metrics, self._by_side(is_good, rewards, own.plain[:, 0].detach()))

    def _by_side(self, is_good: Tensor, rewards: Tensor, logps: Tensor) -> dict[str, Tensor]:
        return {
            "rewards_{split}/chosen": rewards[is_good],
            "rewards_{split}/rejected": rewards[~is_good],
            "logps_{split}/chosen": logps[is_good],
            "logps_{split}/rejected": logps[~is_good],
        }

    def check_first_batch(self, output: LossOutput, num_tokens: int, dtype: torch.dtype) -> None:
        """Require rewards of 0, because before the first step the policy equals the reference.

        Raises:
            UserError: with the largest reward, the tolerance, and possible causes.
        """
        tolerance = reward_tolerance(self.settings.beta, num_tokens, dtype)
        largest = output.metrics["rewards_{split}/signed"].abs().max().item()
        if not largest <= tolerance:  # a NaN fails too
            loss = output.metrics["preference_loss_{split}"].mean().item()
            weights = (self.settings.good_weight, self.settings.bad_weight)
            refuse_start(self.settings.name, dtype, tolerance, largest, sum(weights) / 4, loss)
