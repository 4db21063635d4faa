"""Objectives: from the log-probabilities of a micro-batch to a sum of losses."""

from __future__ import annotations

from config.settings import AnswerLossSettings, LikelihoodLossSettings, LossSettings
from trainers.objectives.answers import AnswerObjective
from trainers.objectives.likelihood import LikelihoodObjective
from trainers.objectives.output import Objective
from trainers.objectives.pairs import PreferenceObjective


def build_objective(settings: LossSettings) -> Objective:
    """Return the objective for `loss=NAME`, from the settings of that loss."""
    if isinstance(settings, LikelihoodLossSettings):
        return LikelihoodObjective(settings)
    if isinstance(settings, AnswerLossSettings):
        return AnswerObjective(settings)
    return PreferenceObjective(settings)
