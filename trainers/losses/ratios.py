"""Losses on log-ratios to a reference, as pure functions.

Letters: B = pairs; y_w = chosen, y_l = rejected, x = prompt; pi = policy, ref = reference; a and b = log pi/ref of
chosen and rejected, h = a - b. Every function maps B pairs and the settings of its loss to B losses. The reward of a
response is beta log pi/ref: Rafailov et al. 2023, equation 5, up to a term of x alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from config.pair_losses import (
    AOTSettings,
    APODownSettings,
    APOZeroSettings,
    BCOPairSettings,
    DiscoPOPSettings,
    DPONormSettings,
    DPOPSettings,
    DPOSettings,
    EXOPairSettings,
    HingeSettings,
    IPOSettings,
    MarginLossSettings,
    NCAPairSettings,
    RobustSettings,
    SPPOHardSettings,
)
from trainers.losses.responses import Pairs


def divergence_slope(log_ratios: Tensor, settings: MarginLossSettings) -> Tensor:
    """Return f'(pi/ref), up to a constant, for the f-divergence that keeps the policy near the reference; (B,).

    Wang et al. 2023 (beyond reverse KL), table 1. The constant cancels in h; without it, reverse KL is exactly the
    log-ratio.
    """
    if settings.f_divergence == "forward_kl":
        return -torch.exp(-log_ratios)
    if settings.f_divergence == "js":
        return F.logsigmoid(log_ratios)
    if settings.f_divergence == "alpha":
        return -torch.expm1(-settings.f_alpha * log_ratios) / settings.f_alpha
    return log_ratios


def margins(pairs: Pairs, settings: MarginLossSettings) -> Tensor:
    """Return h = f'(pi/ref of chosen) - f'(pi/ref of rejected), (B,); with reverse KL h = a - b."""
    chosen, rejected = pairs.ratios
    return divergence_slope(chosen, settings) - divergence_slope(rejected, settings)


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """Return -(1 - e) log sigmoid(x) - e log sigmoid(-x): Bradley-Terry with labels flipped with probability e."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def dpo_loss(pairs: Pairs, settings: DPOSettings) -> Tensor:
    """Return -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).

    e = 0 is Rafailov et al. 2023, equation 7; e > 0 is conservative DPO (Mitchell 2023, equation 3).
    """
    return smoothed(settings.beta * margins(pairs, settings), settings.label_smoothing)


def robust_loss(pairs: Pairs, settings: RobustSettings) -> Tensor:
    """Return (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e): Chowdhury et al. 2024, section 3.

    Averaged over labels flipped with probability e, it is the DPO loss of the true labels. It has no lower bound.
    """
    logits, rate = settings.beta * margins(pairs, settings), settings.label_smoothing
    return (-(1 - rate) * F.logsigmoid(logits) + rate * F.logsigmoid(-logits)) / (1 - 2 * rate)


def ipo_loss(pairs: Pairs, settings: IPOSettings) -> Tensor:
    """Return (h - 1 / (2 beta))^2: Azar et al. 2023, equation 17, where beta is tau.

    The target margin is fixed, so it matters whether log-probabilities are sums over the response (the DPO repo) or
    means per token (the authors of IPO, TRL): `loss.average_logps`.
    """
    return (margins(pairs, settings) - 1 / (2 * settings.beta)).square()


def hinge_loss(pairs: Pairs, settings: HingeSettings) -> Tensor:
    """Return max(0, 1 - beta h): Liu et al. 2023 (RSO), section 3."""
    return F.relu(1 - settings.beta * margins(pairs, settings))


def exo_pair_loss(pairs: Pairs, settings: EXOPairSettings) -> Tensor:
    """Return KL(p || q), p = (sigmoid(beta h), sigmoid(-beta h)), q = (1 - e, e): Ji et al. 2024, equation 16."""
    logits, rate = settings.beta * margins(pairs, settings), settings.label_smoothing
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-rate))
    return chosen + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(rate))


def discopop_loss(pairs: Pairs, settings: DiscoPOPSettings) -> Tensor:
    """Return (1 - m) (-log sigmoid(z)) + m exp(-z), z = beta h, m = sigmoid(z / tau): Lu et al. 2024, equation 5.

    m exp(-z) is computed as one exponential, because for very negative z the two factors would be 0 and infinity.
    """
    logits = settings.beta * margins(pairs, settings)
    modulation = logits / settings.tau
    return -torch.sigmoid(-modulation) * F.logsigmoid(logits) + torch.exp(F.logsigmoid(modulation) - logits)


def nca_pair_loss(pairs: Pairs, settings: NCAPairSettings) -> Tensor:
    """Return -log sigmoid(beta a) - log sigmoid(-beta a) / 2 - log sigmoid(-beta b) / 2.

    Chen et al. 2024 (noise contrastive alignment), section 4, for two responses whose rewards are far apart.
    """
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo_hard_loss(pairs: Pairs, settings: SPPOHardSettings) -> Tensor:
    """Return (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2.

    Wu et al. 2024, equation 4.7, with eta = 1 / beta and a probability of 1 that chosen wins.
    """
    chosen, rejected = pairs.ratios
    half = 1 / (2 * settings.beta)
    return (chosen - half).square() + (rejected + half).square()


def apo_zero_loss(pairs: Pairs, settings: APOZeroSettings) -> Tensor:
    """Return 1 - sigmoid(beta a) + sigmoid(beta b): D'Oosterlinck et al. 2024, equation 7."""
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down_loss(pairs: Pairs, settings: APODownSettings) -> Tensor:
    """Return sigmoid(beta a) + 1 - sigmoid(beta (a - b)): D'Oosterlinck et al. 2024, equation 8."""
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def dpop_loss(pairs: Pairs, settings: DPOPSettings) -> Tensor:
    """Return -log sigmoid(beta (h - lambda max(0, -a))): Pal et al. 2024, equation 3."""
    chosen, rejected = pairs.ratios
    return -F.logsigmoid(settings.beta * (chosen - rejected - settings.penalty * F.relu(-chosen)))


def dpo_norm_loss(pairs: Pairs, settings: DPONormSettings) -> Tensor:
    """Return -log sigmoid(beta (a / |y_w| - b / |y_l|)): Lambert et al. 2024 (Tulu 3), length-normalised DPO."""
    chosen, rejected = pairs.ratios
    return -F.logsigmoid(settings.beta * (chosen - rejected))


def bco_pair_loss(pairs: Pairs, settings: BCOPairSettings) -> Tensor:
    """Return -log sigmoid(beta a - delta) - log sigmoid(-(beta b - delta)): Jung et al. 2024, equation 9.

    delta is the running mean of all rewards, chosen and rejected.
    """
    chosen, rejected = (settings.beta * ratio for ratio in pairs.ratios)
    return -F.logsigmoid(chosen - pairs.baseline) - F.logsigmoid(pairs.baseline - rejected)


def aot_loss(pairs: Pairs, settings: AOTSettings) -> Tensor:
    """Return -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d) for the order statistics d of a global batch.

    Melnyk et al. 2024. paired: d_k = k-th smallest policy margin - k-th smallest reference margin. unpaired: k-th
    smallest a - k-th smallest b. A single loss does not belong to a pair.
    """
    if settings.form == "unpaired":
        high, low = pairs.ratios
    else:
        high, low = (logps[:, 0] - logps[:, 1] for logps in (pairs.policy, pairs.reference))
    return smoothed(settings.beta * (high.sort().values - low.sort().values), settings.label_smoothing)
