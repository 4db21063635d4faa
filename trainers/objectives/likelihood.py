"""Maximum likelihood: supervised fine-tuning and reversed instruction tuning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict

from config.settings import LikelihoodLossSettings
from trainers.data.packing import num_target_tokens
from trainers.losses.responses import LogpsOf, nats_per_token
from trainers.objectives.output import LossOutput


class LikelihoodObjective:
    """Maximum likelihood of the target given the prompt.

    `sequence_sum`: mean over sequences of -log p(target|prompt), the DPO repo's.
    `token_mean`: mean over the target tokens of the global batch, Alpaca's.
    """

    needs_reference = False

    def __init__(self, settings: LikelihoodLossSettings) -> None:
        self.reduction = settings.reduction
        self.state: dict[str, float] = {}

    def begin_batch(self, logps_of: LogpsOf, passes: Sequence[tuple[TensorDict, bool]], device: torch.device) -> None:
        """Ask for nothing: each sequence has its own loss."""

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """Sum -log p over the targets; the two reductions differ only in what the trainer divides by."""
        logps, num_tokens = logps_of(batch)
        detached = logps.detach()
        metrics = {"logps_{split}/chosen": detached, "nll_{split}": nats_per_token(detached, num_tokens)}
        return LossOutput(loss_sum=-logps.sum(), metrics=metrics)

    def num_units(self, batch: TensorDict) -> int:
        """Count sequences, or target tokens."""
        return int(num_target_tokens(batch)) if self.reduction == "token_mean" else len(batch["row"])

    def check_first_batch(self, output: LossOutput, num_tokens: int, dtype: torch.dtype) -> None:
        """Accept any value: a likelihood may begin anywhere."""
