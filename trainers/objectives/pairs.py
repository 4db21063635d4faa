"""Preference losses on pairs of a chosen and a rejected response, and weighted sums of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from config.settings import LossSettings, PairLossSettings, PreferenceLossSettings, weighted_parts
from trainers.losses import PAIR_LOSSES
from trainers.losses.lengths import ld_alpha_of
from trainers.losses.responses import LogpsOf, Pairs, nats_per_token, pair_weights, reward_accuracy
from trainers.objectives.output import LossOutput, Objective, refuse_start, reward_tolerance
from trainers.objectives.passes import ForwardPasses, Responses


def wpo_of(part: PairLossSettings) -> str:
    """Return the WPO weighting of a loss, or "none"."""
    return part.wpo if isinstance(part, PreferenceLossSettings) else "none"


class PreferenceObjective(Objective):
    """The sum over the parts of a loss (several only for `mixture`) of

        weight x (preference loss, weighted by `wpo`, + nll_weight x nats per token of chosen)

    The second term is that of Pang et al. 2024 (iterative reasoning preference optimization, equation 1).
    """  # noqa: D415  # a formula, not a sentence

    def __init__(self, settings: LossSettings) -> None:
        """Take the config group `loss`, for a loss on pairs."""
        super().__init__()
        self.name = settings.name
        self.parts: list[tuple[float, PairLossSettings]] = weighted_parts(settings)
        self.needs_reference = settings.needs_reference
        # Rewards are reported on the scale of the first part with a reference, or else of the first part.
        self.scale = max((part for _, part in self.parts), key=lambda part: part.needs_reference)
        self.passes = ForwardPasses(
            needs_reference=self.needs_reference,
            ld_alpha=ld_alpha_of(settings),
            agreements=any(wpo_of(part) == "sampled" for _, part in self.parts),
        )
        self._whole: Responses | None = None

    def begin_batch(self, logps_of: LogpsOf, passes: Sequence[tuple[TensorDict, bool]], device: torch.device) -> None:
        """Run the whole batch first, if a part compares its pairs or, in training, keeps a running mean of rewards."""
        means = [part for _, part in self.parts if part.running_mean and torch.is_grad_enabled()]
        if not means and not any(part.whole_batch for _, part in self.parts):
            return
        self._whole = self.passes.whole_batch(logps_of, passes, device)
        for part in means:
            rewards = part.beta * torch.cat(self._pairs(part, self._whole).ratios)
            if rewards.isfinite().all():  # or a bad row would show in the losses of all
                self.state["reward_sum"] = self.state.get("reward_sum", 0.0) + rewards.sum().item()
                self.state["rewards"] = self.state.get("rewards", 0.0) + len(rewards)

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """Run chosen and rejected in one forward pass: B rows -> log-probabilities (B, 2)."""
        own = self.passes(logps_of, batch)
        nll = nats_per_token(own.plain[:, 0], own.num_tokens[:, 0])
        total, preference = torch.zeros((), device=nll.device), torch.zeros((), device=nll.device)
        for weight, part in self.parts:
            losses = self._losses(part, own)
            preference = preference + weight * losses.detach()
            if wpo_of(part) != "none":
                agreements = own.agreements if wpo_of(part) == "sampled" else 0.0
                losses = pair_weights(own.plain, own.num_tokens, agreements) * losses
            total = total + weight * (losses + part.nll_weight * nll if part.nll_weight else losses)
        chosen, rejected = (self.scale.beta * ratio.detach() for ratio in self._pairs(self.scale, own).ratios)
        metrics = {
            "rewards_{split}/chosen": chosen,
            "rewards_{split}/rejected": rejected,
            "rewards_{split}/accuracies": reward_accuracy(chosen, rejected),
            "rewards_{split}/margins": chosen - rejected,
            "logps_{split}/chosen": own.plain[:, 0].detach(),
            "logps_{split}/rejected": own.plain[:, 1].detach(),
            "preference_loss_{split}": preference,
            "nll_{split}": nll.detach(),
        }
        return LossOutput(loss_sum=total.sum(), metrics=metrics)

    def _pairs(self, part: PairLossSettings, responses: Responses) -> Pairs:
        """Return the pairs in the form that a part asks for (reference, means per token, baseline)."""
        policy, reference = responses.policy, responses.reference
        if not part.needs_reference:
            reference = torch.zeros_like(policy)
        if part.per_token:
            num_tokens = responses.num_tokens.clamp(min=1)
            policy, reference = policy / num_tokens, reference / num_tokens
        seen = self.state.get("rewards", 0.0) if part.running_mean else 0.0
        return Pairs(policy, reference, baseline=self.state["reward_sum"] / seen if seen else 0.0)

    def _losses(self, part: PairLossSettings, own: Responses) -> Tensor:
        """Return the losses of a micro-batch, (B,); their sum has its share of the gradient of the global batch."""
        function = PAIR_LOSSES[part.name]
        if not part.whole_batch or self._whole is None:
            return function(self._pairs(part, own), part)
        # Single losses do not belong to single pairs, so spread the gradient of their sum over this micro-batch's rows.
        whole = self._whole.with_gradient_of(own)
        losses = function(self._pairs(part, whole), part)
        gradient = losses.sum() - losses.sum().detach()  # 0, with a gradient
        return losses.detach()[self._whole.places(own.rows)] + gradient / len(own.rows)

    def check_first_batch(self, output: LossOutput, num_tokens: int, dtype: torch.dtype) -> None:
        """Require rewards of 0 and the matching loss, because before the first step the policy equals the reference.

        Raises:
            UserError: with the largest reward, the tolerance, and possible causes.
        """
        if not self.needs_reference:
            return
        beta = self.scale.beta
        tolerance = reward_tolerance(beta, 1 if self.scale.per_token else num_tokens, dtype)
        expected, least, most = self._start(tolerance / beta)
        rewards = torch.stack([output.metrics["rewards_{split}/chosen"], output.metrics["rewards_{split}/rejected"]])
        largest = rewards.abs().max().item()
        loss = output.metrics["preference_loss_{split}"].mean().item()
        known = all(part.needs_reference for _, part in self.parts)  # without a reference, any initial loss is possible
        if not (largest <= tolerance and (least <= loss <= most or not known)):  # a NaN fails too
            refuse_start(self.name, dtype, tolerance, largest, expected, loss)

    def _start(self, off: float) -> tuple[float, float, float]:
        """Return the loss for equal policy and reference, and its range if log-ratios are `off` by rounding."""
        totals = torch.zeros(5, dtype=torch.float64)
        for weight, part in self.parts:
            for i, ratios in enumerate([(0.0, 0.0), *itertools.product((-off, off), repeat=2)]):
                policy = torch.tensor([ratios], dtype=torch.float64)
                totals[i] += weight * PAIR_LOSSES[part.name](Pairs(policy, torch.zeros_like(policy)), part).item()
        return totals[0].item(), totals.min().item(), totals.max().item()
