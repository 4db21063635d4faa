"""Settings of the other losses (likelihood, single answers, mixtures), and the table of all losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from config import pair_losses as pairs
from config import rules
from config.pair_losses import LossSettings, NotNegative, Positive, Rows


@dataclass
class LikelihoodLossSettings(LossSettings):
    """Maximum likelihood of the target given the prompt."""

    # What the loss is a mean over: sequences, each the sum of its tokens (DPO repo) | all target tokens (Alpaca).
    reduction: Annotated[str, rules.choices("sequence_sum", "token_mean")] = "sequence_sum"


@dataclass
class SFTSettings(LikelihoodLossSettings):
    """`loss=sft`: supervised fine-tuning on the chosen, or only, response."""

    name: str = "sft"
    on: Annotated[str, rules.choices("last", "all")] = "last"  # answers of a conversation to train on


@dataclass
class ReverseSettings(LikelihoodLossSettings):
    """`loss=reverse`: the instruction given the response (Safer-Instruct, section 3.1)."""

    rows: ClassVar[Rows] = "reversed"

    name: str = "reverse"
    reduction: Annotated[str, rules.choices("sequence_sum", "token_mean")] = "token_mean"
    on: Annotated[str, rules.choices("first", "all")] = "first"  # turns of a conversation to train on


@dataclass
class AnswerLossSettings(LossSettings):
    """A loss on single answers that are good or bad."""

    rows: ClassVar[Rows] = "answers"
    reads_reference: ClassVar[bool] = True
    mismatched: ClassVar[bool] = False  # reads how the policy has moved on answers to other prompts

    beta: Positive = 0.1  # temperature of the implicit reward
    good_weight: NotNegative = 1.0  # weight of good answers, lambda_D
    bad_weight: NotNegative = 1.0  # weight of bad answers, lambda_U


@dataclass
class KTOSettings(AnswerLossSettings):
    """`loss=kto`: Kahneman-Tversky optimisation (Ethayarajh et al. 2024, equation 8)."""

    mismatched: ClassVar[bool] = True

    name: str = "kto"


@dataclass
class APOZeroUnpairedSettings(AnswerLossSettings):
    """`loss=apo_zero_unpaired`: apo_zero on single answers (D'Oosterlinck et al. 2024)."""

    name: str = "apo_zero_unpaired"


@dataclass
class MixtureSettings(LossSettings):
    """`loss=mixture`: a weighted sum of several losses on pairs."""

    rows: ClassVar[Rows] = "pairs"

    name: str = "mixture"
    # Loss -> its keys and its weight (default 1): `{dpo: {weight: 0.8, beta: 0.2}, slic: {}}`.
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probabilities of a reference are read."""
        return any(part.needs_reference for _, part in weighted_parts(self))


LOSSES: dict[str, type[LossSettings]] = {
    "sft": SFTSettings, "reverse": ReverseSettings, "dpo": pairs.DPOSettings, "cdpo": pairs.CDPOSettings,
    "rpo": pairs.RPOSettings, "robust": pairs.RobustSettings, "ipo": pairs.IPOSettings, "hinge": pairs.HingeSettings,
    "exo_pair": pairs.EXOPairSettings, "discopop": pairs.DiscoPOPSettings, "nca_pair": pairs.NCAPairSettings,
    "sppo_hard": pairs.SPPOHardSettings, "apo_zero": pairs.APOZeroSettings, "apo_down": pairs.APODownSettings,
    "dpop": pairs.DPOPSettings, "dpo_norm": pairs.DPONormSettings, "bco_pair": pairs.BCOPairSettings,
    "aot": pairs.AOTSettings, "slic": pairs.SLiCSettings, "cpo": pairs.CPOSettings, "orpo": pairs.ORPOSettings,
    "simpo": pairs.SimPOSettings, "alphapo": pairs.AlphaPOSettings, "kto": KTOSettings,
    "apo_zero_unpaired": APOZeroUnpairedSettings, "mixture": MixtureSettings,
}  # fmt: skip


def weighted_parts(settings: LossSettings) -> list[tuple[float, Any]]:
    """Return the (weight, loss) terms of a loss: the parts of a mixture, or the loss itself with weight 1."""
    if not isinstance(settings, MixtureSettings):
        return [(1.0, settings)]
    return [part_settings(name, keys) for name, keys in settings.parts.items()]


def part_settings(name: str, keys: Mapping[str, Any] | None) -> tuple[float, LossSettings]:
    """Return weight and settings of one part of a mixture, whose keys have been checked."""
    own = {key: value for key, value in (keys or {}).items() if key != "weight"}
    return float((keys or {}).get("weight", 1.0)), LOSSES[name](**own)
