"""What a loss sees of a micro-batch, and the quantities that several losses are made of.

Letters: B = pairs, or single answers. Everything is in nats and in the dtype that the log-probabilities have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A micro-batch -> log-probabilities and numbers of target tokens of its sequences, as `sequence_logps` under a model;
# with `agreements=True` those, too.
LogpsOf = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Pairs:
    """B pairs, column 0 chosen and column 1 rejected.

    Attributes:
        policy: (B, 2) log pi(y|x), sums over the response; means per token for a loss that asks for these.
        reference: (B, 2), likewise of the reference; zeros for a loss without one.
        baseline: The mean of all rewards so far, of a loss that asks for it.
    """

    policy: Tensor
    reference: Tensor
    baseline: float = 0.0

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of chosen and rejected to the reference, each (B,)."""
        chosen, rejected = (self.policy - self.reference).unbind(-1)
        return chosen, rejected


@dataclass(frozen=True)
class Answers:
    """B single answers.

    Attributes:
        ratios: (B,) log pi(y|x)/ref(y|x).
        is_good: (B,) bool.
        divergence: What the policy has moved on answers to other prompts: a scalar of 0 or more, without gradient.
    """

    ratios: Tensor
    is_good: Tensor
    divergence: Tensor


def reward_accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Return 1 where chosen is rewarded more than rejected, 0 where less, 1/2 at a tie; (B,), dtype of the rewards.

    Before the first step policy and reference are one model and every pair is a tie: an accuracy of 0.5, as a coin.
    """
    return 0.5 * (1 + torch.sign(chosen_rewards - rejected_rewards))


def nats_per_token(logps: Tensor, num_tokens: Tensor) -> Tensor:
    """Return the mean negative log-probability of a token of each sequence; 0 where there are no target tokens."""
    return -logps / num_tokens.clamp(min=1)


def pair_weights(policy: Tensor, num_tokens: Tensor, agreements: Tensor | float = 0.0) -> Tensor:
    """Return how probable the policy finds both responses of each pair: (B,), without gradient; in 0..1 if not aligned.

    w(x, y_w) w(x, y_l) with w(x, y) = exp(mean over tokens of log pi) (Zhou et al. 2024, WPO, equation 2). The sampled
    alignment of its section 3.2 divides the probability of each token by the one that a sample has on average:

        w(x, y) = exp(mean over tokens t of log(pi(y_t|...) / sum over v of pi(v|...)^2))

    Args:
        policy: (B, 2) sums of log-probabilities.
        num_tokens: (B, 2).
        agreements: (B, 2) sums of the logarithms of these denominators; 0: no alignment.
    """
    return (-nats_per_token((policy - agreements).detach(), num_tokens)).sum(-1).exp()
