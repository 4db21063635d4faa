"""Preference losses as pure functions of per-sequence log-probabilities.

Letters: B = pairs; y_w = chosen, y_l = rejected, x = prompt; pi = policy, ref = reference. All arguments are (B,)
vectors of log pi(y|x), in nats, and every result is (B,), in the dtype that the arguments promote to. A loss without
a reference is given zeros for it: it then drops out of the loss *and* of the rewards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, chosen rewards and rejected rewards, each (B,), of direct preference optimization.

    With h = log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x):

        loss   = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)
        reward = beta log pi(y|x)/ref(y|x)

    eps = 0 is Rafailov et al. 2023, eq. 7; eps = `label_smoothing` > 0 is conservative DPO (Mitchell 2023, eq. 3),
    which assumes that a preference is flipped with that probability. Rewards are eq. 5 up to a term of x alone,
    detached.
    """
    chosen_ratio, rejected_ratio = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    logits = beta * (chosen_ratio - rejected_ratio)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return losses, beta * chosen_ratio.detach(), beta * rejected_ratio.detach()


def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, chosen rewards and rejected rewards, each (B,), of identity preference optimization.

    With h as in `dpo_loss`, and tau of the paper written as beta:

        loss = (h - 1 / (2 beta))^2            (Azar et al. 2023, eq. 17)

    The margin that it regresses to is fixed, so it matters whether the log-probabilities are sums over the response
    (the DPO repo) or means per token (the authors of IPO): the caller divides, see `loss.average_logps`.
    """
    chosen_ratio, rejected_ratio = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    losses = (chosen_ratio - rejected_ratio - 1 / (2 * beta)).square()
    return losses, beta * chosen_ratio.detach(), beta * rejected_ratio.detach()


def reward_accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Return 1 where chosen is rewarded more than rejected, 0 where less, 1/2 at a tie; (B,), dtype of the rewards.

    Before the first step policy and reference are one model and every pair is a tie: an accuracy of 0.5, as a coin.
    """
    return 0.5 * (1 + torch.sign(chosen_rewards - rejected_rewards))
