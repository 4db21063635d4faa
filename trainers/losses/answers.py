"""Losses on single answers judged good or bad, as pure functions.

Letters: B = answers; r = log pi/ref of an answer. Every function maps B answers and the settings of its loss to B
losses, with the weights lambda_D for good and lambda_U for bad answers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from config.losses import AnswerLossSettings, APOZeroUnpairedSettings, KTOSettings
from trainers.losses.responses import Answers


def weights(answers: Answers, settings: AnswerLossSettings) -> Tensor:
    """Return lambda_D for good and lambda_U for bad answers, (B,)."""
    good, bad = (torch.full_like(answers.ratios, value) for value in (settings.good_weight, settings.bad_weight))
    return torch.where(answers.is_good, good, bad)


def kto_loss(answers: Answers, settings: KTOSettings) -> Tensor:
    """Return lambda_y - v(x, y): Ethayarajh et al. 2024, equation 8, with z0 = `answers.divergence`.

    v = lambda_D sigmoid(beta (r - z0)) for a good answer, lambda_U sigmoid(beta (z0 - r)) for a bad one.
    """
    moved = answers.ratios - answers.divergence
    return weights(answers, settings) * torch.sigmoid(settings.beta * torch.where(answers.is_good, -moved, moved))


def apo_zero_unpaired_loss(answers: Answers, settings: APOZeroUnpairedSettings) -> Tensor:
    """Return 1 - sigmoid(beta r) for a good answer and sigmoid(beta r) for a bad one.

    D'Oosterlinck et al. 2024: equation 7 split into its two answers, each with its weight.
    """
    moved = answers.ratios
    return weights(answers, settings) * torch.sigmoid(settings.beta * torch.where(answers.is_good, -moved, moved))
