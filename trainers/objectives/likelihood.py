"""Maximum likelihood: supervised fine-tuning and reversed instruction tuning."""

from __future__ import annotations

from tensordict import TensorDict

from config.settings import LikelihoodLossSettings
from trainers.data.packing import num_target_tokens
from trainers.losses.responses import LogpsOf, nats_per_token
from trainers.objectives.output import LossOutput, Objective


class LikelihoodObjective(Objective):
    """Maximum likelihood of the target given the prompt.

    `sequence_sum`: mean over sequences of -log p(target|prompt), as in the DPO repo.
    `token_mean`: mean over the target tokens of the global batch, as in Alpaca.
    """

    def __init__(self, settings: LikelihoodLossSettings) -> None:
        super().__init__()
        self.reduction = settings.reduction

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> LossOutput:
        """Sum -log p over the targets; the reductions differ only in the count by which the trainer divides."""
        logps, num_tokens = logps_of(batch)
        detached = logps.detach()
        metrics = {"logps_{split}/chosen": detached, "nll_{split}": nats_per_token(detached, num_tokens)}
        return LossOutput(loss_sum=-logps.sum(), metrics=metrics)

    def num_units(self, batch: TensorDict) -> int:
        """Count sequences, or target tokens for `token_mean`."""
        return int(num_target_tokens(batch)) if self.reduction == "token_mean" else len(batch["row"])
