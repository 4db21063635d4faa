"""Losses on the policy's own log-probabilities, without a reference, as pure functions.

Letters as in `trainers.losses.ratios`; p_w and p_l = log pi of chosen and rejected. The reward of a response is beta
log pi, where log pi is the mean per token if the loss uses means.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from config.pair_losses import AlphaPOSettings, CPOSettings, ORPOSettings, SimPOSettings, SLiCSettings
from trainers.losses.responses import Pairs

SMALLEST_NLL = 1e-6  # nats per token; it avoids infinite odds for a sequence of probability 1


def slic_loss(pairs: Pairs, settings: SLiCSettings) -> Tensor:
    """Return max(0, beta - p_w + p_l) - lambda p_w: Zhao et al. 2023, equation 1 with chosen as its target."""
    chosen, rejected = pairs.policy.unbind(-1)
    return F.relu(settings.beta - chosen + rejected) - settings.likelihood_weight * chosen


def cpo_loss(pairs: Pairs, settings: CPOSettings) -> Tensor:
    """Return -log sigmoid(beta (p_w - p_l)): Xu et al. 2024, equation 3; `nll_weight` adds their likelihood term."""
    chosen, rejected = pairs.policy.unbind(-1)
    return -F.logsigmoid(settings.beta * (chosen - rejected))


def log_odds(logps: Tensor) -> Tensor:
    """Return log(P / (1 - P)) of sequences, where P = exp(mean log-probability per token)."""
    logps = logps.clamp(max=-SMALLEST_NLL)
    return logps - torch.log(-torch.expm1(logps))


def orpo_loss(pairs: Pairs, settings: ORPOSettings) -> Tensor:
    """Return -beta log sigmoid(log odds of chosen - log odds of rejected): Hong et al. 2024, equation 7.

    beta is lambda of equation 6, whose likelihood term `nll_weight` adds.
    """
    chosen, rejected = map(log_odds, pairs.policy.unbind(-1))
    return -settings.beta * F.logsigmoid(chosen - rejected)


def simpo_loss(pairs: Pairs, settings: SimPOSettings) -> Tensor:
    """Return -log sigmoid(beta p_w / |y_w| - beta p_l / |y_l| - gamma): Meng et al. 2024, equation 6."""
    chosen, rejected = pairs.policy.unbind(-1)
    return -F.logsigmoid(settings.beta * (chosen - rejected) - settings.margin)


def alphapo_loss(pairs: Pairs, settings: AlphaPOSettings) -> Tensor:
    """Return -log sigmoid(r_w - r_l - gamma), r = beta (1 - exp(-alpha p / |y|)) / alpha: Gupta et al. 2025."""
    chosen, rejected = (-torch.expm1(-settings.alpha * logps) / settings.alpha for logps in pairs.policy.unbind(-1))
    return -F.logsigmoid(settings.beta * (chosen - rejected) - settings.margin)
