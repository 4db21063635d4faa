"""Preference losses as pure functions of per-sequence log-probabilities.

Letters: B = pairs; y_w = chosen, y_l = rejected, x = prompt; pi = policy, ref = reference. All arguments are (B,)
vectors of log pi(y|x), in nats, and every result is (B,), in the dtype that the arguments promote to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_ratios(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns log pi/ref of chosen and of rejected, each (B,).

    A reference-free objective is one with a uniform reference. Its log-probabilities cancel in the difference of the
    two ratios, so they are left out here, and with them of the loss *and* of the rewards.
    """
    if reference_free:
        return policy_chosen, policy_rejected
    return policy_chosen - reference_chosen, policy_rejected - reference_rejected


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimization: (losses, chosen rewards, rejected rewards), each (B,).

    With h = log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x):

        loss   = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)
        reward = beta log pi(y|x)/ref(y|x)

    eps = 0 is Rafailov et al. 2023, eq. 7; eps = `label_smoothing` > 0 is conservative DPO (Mitchell 2023, eq. 3),
    which assumes that a preference is flipped with that probability. Rewards are eq. 5 up to a term of x alone,
    detached.
    """
    chosen_ratio, rejected_ratio = log_ratios(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, reference_free=reference_free
    )
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
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Identity preference optimization: (losses, chosen rewards, rejected rewards), each (B,).

    With h as in `dpo_loss`, and tau of the paper written as beta:

        loss = (h - 1 / (2 beta))^2            (Azar et al. 2023, eq. 17)

    The margin that it regresses to is fixed, so it matters whether the log-probabilities are sums over the response
    (the DPO repo) or means per token (the authors of IPO): the caller divides, see `loss.average_logps`.
    """
    chosen_ratio, rejected_ratio = log_ratios(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, reference_free=reference_free
    )
    losses = (chosen_ratio - rejected_ratio - 1 / (2 * beta)).square()
    return losses, beta * chosen_ratio.detach(), beta * rejected_ratio.detach()


def reward_accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 where chosen is rewarded more than rejected, 0 where less, one half at a tie; (B,), dtype of the rewards.

    Before the first step policy and reference are one model and every pair is a tie: an accuracy of 0.5, as a coin.
    """
    return 0.5 * (1 + torch.sign(chosen_rewards - rejected_rewards))
