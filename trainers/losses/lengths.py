"""LD-DPO: log-probabilities in which tokens beyond the length of the shorter response have less weight.

Letters: B = pairs, T = positions of a padded row.
"""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from config.settings import LossSettings, PreferenceLossSettings, weighted_parts
from trainers.data.packing import is_packed
from trainers.losses.responses import LogpsOf


def response_logps(
    logps_of: LogpsOf, batch: TensorDict, ld_alpha: float | None, agreements: bool = False
) -> tuple[Tensor, ...]:
    """Return weighted log-probabilities, plain ones, and numbers of target tokens: each (B, 2).

    On request, also return the agreements of `sequence_logps`, which are not weighted.

    With l = the length of the shorter response of a pair, the weighted log-probability is

        sum over t <= l of log pi(y_t|...) + alpha x (sum over t > l)          (Liu et al. 2024, equation 9)

    Args:
        logps_of: Computes log-probabilities under the model.
        batch: A micro-batch of rows with two responses.
        ld_alpha: Weight of the later tokens; None: both results are the plain sums, at no extra cost.
        agreements: Whether to return agreements.
    """
    asked = {"agreements": True} if agreements else {}
    if ld_alpha is None:
        logps, *rest = logps_of(batch, **asked)
        return logps, logps, *rest
    if is_packed(batch):
        # Sums follow `num_targets`, so splitting each response into two counts gives the sum of each part.
        num_tokens = batch["num_targets"]
        public = num_tokens.amin(-1, keepdim=True).expand_as(num_tokens)
        parts = torch.stack([public, num_tokens - public], dim=-1)
        logps, _, *more = logps_of(batch.copy().set("num_targets", parts.flatten(1)), **asked)
        sums = logps.view_as(parts)
        whole = (values.view_as(parts).sum(-1) for values in more)
        return sums[..., 0] + ld_alpha * sums[..., 1], sums.sum(-1), num_tokens, *whole
    # Padded rows are simply run twice, because packed rows are the fast path.
    logps, num_tokens, *more = logps_of(batch, **asked)
    counted = batch["response_mask"].clone()
    counted[..., 0] = False  # never a target, because nothing predicts it
    public = num_tokens.amin(-1)[:, None, None]
    shared, *_ = logps_of(batch.copy().set("response_mask", counted & (counted.cumsum(-1) <= public)))
    return shared + ld_alpha * (logps - shared), logps, num_tokens, *more


def ld_alpha_of(settings: LossSettings) -> float | None:
    """Return the weight of tokens beyond the shorter response's length; all parts of a mixture share it."""
    own = [part.ld_alpha for _, part in weighted_parts(settings) if isinstance(part, PreferenceLossSettings)]
    return own[0] if own else None
