"""Settings of the losses on pairs, and what all losses have in common; `config/losses.py` has the other losses.

Class variables, not keys, declare what a loss needs from the trainer: which rows, log-probabilities of a reference or
not, means per token or sums, and whether its value depends on several rows. docs/losses.md has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from config import rules
from config.rules import MISSING

# responses: prompt and chosen | reversed: response and instruction | pairs: chosen and rejected | answers: one, judged
Rows = Literal["responses", "reversed", "pairs", "answers"]
Positive = Annotated[float, rules.above(0)]
NotNegative = Annotated[float, rules.at_least(0)]
FlipRate = Annotated[float, rules.interval("[0, 0.5)", "; at 0.5 both responses count the same")]


@dataclass
class LossSettings:
    """Settings that every loss has."""

    rows: ClassVar[Rows] = "responses"
    reads_reference: ClassVar[bool] = False

    name: str = MISSING  # the loss, as in `loss=NAME`

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probabilities of a reference are read."""
        return self.reads_reference


@dataclass
class PairLossSettings(LossSettings):
    """A loss on chosen and rejected that by default needs no reference."""

    rows: ClassVar[Rows] = "pairs"
    whole_batch: ClassVar[bool] = False  # compares responses of different pairs of a global batch
    running_mean: ClassVar[bool] = False  # reads the mean of all rewards so far
    normalised: ClassVar[bool] = False  # always reads means per token

    beta: Positive = 0.1  # temperature of the implicit reward
    nll_weight: NotNegative = 0.0  # add this x (nats per token of chosen), Pang et al. 2024

    @property
    def per_token(self) -> bool:
        """Whether the log-probabilities are means per token of the response, not sums."""
        return self.normalised


@dataclass
class PreferenceLossSettings(PairLossSettings):
    """A loss on the log-ratios of chosen and rejected to a reference."""

    reference_free: bool = False  # use a uniform reference: its log-ratio is 0, in loss and rewards
    average_logps: bool = False  # divide log-probabilities by the response length in tokens (the IPO authors' form)
    # Weight of a pair (Zhou et al. 2024): none | the probability per token that the policy gives its responses (plain)
    # | that, relative to the expected probability of a token sampled from the policy (sampled, the paper's choice).
    wpo: Annotated[str, rules.choices("none", "plain", "sampled")] = "none"
    # LD-DPO (Liu et al. 2024): weight of a token beyond the length of the shorter response; null: as all others.
    ld_alpha: Annotated[float, rules.interval("[0, 1]")] | None = None

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probabilities of a reference are read."""
        return not self.reference_free

    @property
    def per_token(self) -> bool:
        """Whether the log-probabilities are means per token of the response, not sums."""
        return self.average_logps


@dataclass
class MarginLossSettings(PreferenceLossSettings):
    """A loss on the difference of the two log-ratios."""

    # Divergence that keeps the policy near the reference (Wang et al. 2023, table 1); reverse_kl is DPO's.
    f_divergence: Annotated[str, rules.choices("reverse_kl", "forward_kl", "js", "alpha")] = "reverse_kl"
    f_alpha: Annotated[float, rules.interval("(0, 1)")] = 0.5  # alpha of f_divergence=alpha


@dataclass
class DPOSettings(MarginLossSettings):
    """`loss=dpo`: direct preference optimisation (Rafailov et al. 2023, equation 7)."""

    name: str = "dpo"
    # Probability that a preference is flipped (conservative DPO); 0: trust every preference.
    label_smoothing: FlipRate = 0.0


@dataclass
class CDPOSettings(DPOSettings):
    """`loss=cdpo`: conservative DPO (Mitchell 2023, equation 3), that is dpo with label smoothing."""

    name: str = "cdpo"
    label_smoothing: FlipRate = 0.1


@dataclass
class RPOSettings(DPOSettings):
    """`loss=rpo`: DPO and the likelihood of chosen (Pang et al. 2024, equation 1), that is dpo with nll_weight."""

    name: str = "rpo"
    nll_weight: NotNegative = 1.0


@dataclass
class RobustSettings(MarginLossSettings):
    """`loss=robust`: a DPO loss that stays unbiased when preferences are flipped (Chowdhury et al. 2024)."""

    name: str = "robust"
    label_smoothing: FlipRate = 0.1  # probability that a preference is flipped


@dataclass
class IPOSettings(MarginLossSettings):
    """`loss=ipo`: identity preference optimisation (Azar et al. 2023, equation 17); beta is their tau."""

    name: str = "ipo"


@dataclass
class HingeSettings(MarginLossSettings):
    """`loss=hinge`: the hinge loss of RSO (Liu et al. 2023)."""

    name: str = "hinge"


@dataclass
class EXOPairSettings(MarginLossSettings):
    """`loss=exo_pair`: efficient exact optimisation on pairs (Ji et al. 2024)."""

    name: str = "exo_pair"
    # Probability that a preference is flipped; the loss is infinite at 0.
    label_smoothing: Annotated[float, rules.interval("(0, 0.5)")] = 1e-3


@dataclass
class DiscoPOPSettings(MarginLossSettings):
    """`loss=discopop`: a loss discovered by a language model (Lu et al. 2024)."""

    name: str = "discopop"
    # Width of the transition from the logistic to the exponential loss.
    tau: Annotated[float, rules.interval("(0, 1)")] = 0.05


@dataclass
class NCAPairSettings(PreferenceLossSettings):
    """`loss=nca_pair`: noise contrastive alignment on pairs (Chen et al. 2024)."""

    name: str = "nca_pair"


@dataclass
class SPPOHardSettings(PreferenceLossSettings):
    """`loss=sppo_hard`: self-play preference optimisation with hard labels (Wu et al. 2024)."""

    name: str = "sppo_hard"


@dataclass
class APOZeroSettings(PreferenceLossSettings):
    """`loss=apo_zero`: anchored preference optimisation, chosen up and rejected down (D'Oosterlinck et al. 2024)."""

    name: str = "apo_zero"


@dataclass
class APODownSettings(PreferenceLossSettings):
    """`loss=apo_down`: anchored preference optimisation, both down (D'Oosterlinck et al. 2024)."""

    name: str = "apo_down"


@dataclass
class DPOPSettings(PreferenceLossSettings):
    """`loss=dpop`: DPO-positive, which keeps chosen at its reference likelihood (Pal et al. 2024, equation 3)."""

    name: str = "dpop"
    penalty: NotNegative = 50.0  # lambda: penalty per nat that chosen falls below the reference


@dataclass
class DPONormSettings(PairLossSettings):
    """`loss=dpo_norm`: DPO on log-ratios per token (Lambert et al. 2024, section 5)."""

    reads_reference: ClassVar[bool] = True
    normalised: ClassVar[bool] = True

    name: str = "dpo_norm"
    beta: Positive = 5.0


@dataclass
class BCOPairSettings(PairLossSettings):
    """`loss=bco_pair`: binary classifier optimisation on pairs (Jung et al. 2024)."""

    reads_reference: ClassVar[bool] = True
    running_mean: ClassVar[bool] = True

    name: str = "bco_pair"


@dataclass
class AOTSettings(PairLossSettings):
    """`loss=aot`: distributional alignment by optimal transport (Melnyk et al. 2024)."""

    reads_reference: ClassVar[bool] = True
    whole_batch: ClassVar[bool] = True

    name: str = "aot"
    # What to sort over the batch: differences within a pair, policy's and reference's | log-ratios of all responses.
    form: Annotated[str, rules.choices("paired", "unpaired")] = "paired"
    label_smoothing: FlipRate = 0.0  # probability that a preference is flipped


@dataclass
class SLiCSettings(PairLossSettings):
    """`loss=slic`: sequence likelihood calibration (Zhao et al. 2023)."""

    name: str = "slic"
    beta: Positive = 1.0  # the margin in nats, their delta
    likelihood_weight: NotNegative = 0.1  # lambda: weight of the log-probability of chosen


@dataclass
class CPOSettings(PairLossSettings):
    """`loss=cpo`: contrastive preference optimisation (Xu et al. 2024), with the likelihood of chosen."""

    name: str = "cpo"
    nll_weight: NotNegative = 1.0  # weight of the likelihood term, in nats per token


@dataclass
class ORPOSettings(PairLossSettings):
    """`loss=orpo`: odds ratio preference optimisation (Hong et al. 2024, equation 6); beta is their lambda."""

    normalised: ClassVar[bool] = True

    name: str = "orpo"
    nll_weight: NotNegative = 1.0  # weight of the likelihood term, in nats per token


@dataclass
class SimPOSettings(PairLossSettings):
    """`loss=simpo`: simple preference optimisation (Meng et al. 2024, equation 6)."""

    normalised: ClassVar[bool] = True

    name: str = "simpo"
    beta: Positive = 2.0
    gamma: NotNegative = 1.0  # the margin of the rewards (the paper, TRL)
    # The margin as a multiple of beta, instead of gamma (the authors' code); null: use gamma.
    gamma_beta_ratio: NotNegative | None = None

    @property
    def margin(self) -> float:
        """The margin of the rewards."""
        return self.gamma if self.gamma_beta_ratio is None else self.gamma_beta_ratio * self.beta


@dataclass
class AlphaPOSettings(SimPOSettings):
    """`loss=alphapo`: SimPO with a bent reward (Gupta et al. 2025)."""

    name: str = "alphapo"
    beta: Positive = 2.5
    gamma: NotNegative = 0.1  # the margin of the rewards
    # Curvature of the reward; near 0 it is SimPO's.
    alpha: Annotated[float, rules.other_than_zero("; write loss=simpo")] = 0.25
