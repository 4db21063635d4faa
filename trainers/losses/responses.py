"""The inputs of a loss, and quantities that several losses share.

Letters: B = pairs, or single answers. Everything is in nats and in the dtype of the log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Micro-batch -> log-probabilities and numbers of target tokens of its sequences: `sequence_logps` with a model bound.
# With `agreements=True`, agreements too.
LogpsOf = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Pairs:
    """B pairs, column 0 chosen and column 1 rejected.

    Attributes:
        policy: (B, 2) log pi(y|x): sums over the response, or means per token if the loss uses means.
        reference: (B, 2), the same for the reference; zeros for a loss without one.
        baseline: The running mean of all rewards, for a loss that uses it.
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
        divergence: KL estimate from answers to other prompts (z0 of KTO): a scalar >= 0, without gradient.
    """

    ratios: Tensor
    is_good: Tensor
    divergence: Tensor


def reward_accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Return 1 if chosen has the higher reward, 0 if rejected has, 1/2 for a tie; (B,), dtype of the rewards.

    Before the first step policy and reference are equal, so every pair is a tie and the accuracy 0.5.
    """
    return 0.5 * (1 + torch.sign(chosen_rewards - rejected_rewards))


def nats_per_token(logps: Tensor, num_tokens: Tensor) -> Tensor:
    """Return the mean negative log-probability per token of each sequence; 0 if it has no target tokens."""
    return -logps / num_tokens.clamp(min=1)


def pair_weights(policy: Tensor, num_tokens: Tensor, agreements: Tensor | float = 0.0) -> Tensor:
    """Return the WPO weight of each pair, (B,), without gradient; between 0 and 1 without alignment.

    w(x, y_w) w(x, y_l) with w(x, y) = exp(mean over tokens of log pi) (Zhou et al. 2024, WPO, equation 2). The sampled
    alignment of its section 3.2 divides the probability of each token by the mean probability of a sampled token:

        w(x, y) = exp(mean over tokens t of log(pi(y_t|...) / sum over v of pi(v|...)^2))

    Args:
        policy: (B, 2) sums of log-probabilities.
        num_tokens: (B, 2).
        agreements: (B, 2) sums of the logs of these denominators; 0: no alignment.
    """
    return (-nats_per_token((policy - agreements).detach(), num_tokens)).sum(-1).exp()
