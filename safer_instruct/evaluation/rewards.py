"""Implicit rewards of models as they were trained: on which scale, and on which pairs that they have seen before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from config.errors import UserError
from config.settings import RewardSettings
from safer_instruct.evaluation.respondents import Respondent
from safer_instruct.measures.reward_checks import check_rewards
from safer_instruct.report.training_runs import find_training_overlap, run_config

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class RewardScale:
    """What makes a reward of log-probabilities: the keys of `loss=` that a run was trained with.

    Attributes:
        beta: Factor of the log-ratio.
        average_logps: Log-probabilities are means over the tokens of a response, not sums.
        reference_free: Nothing is subtracted for the reference.
    """

    beta: float
    average_logps: bool = False
    reference_free: bool = False


def reward_scales(respondents: Mapping[str, Respondent], settings: RewardSettings) -> dict[str, RewardScale]:
    """Return the scale of every model but the reference: from its run, or from the command for a plain model folder.

    Raises:
        UserError: The command contradicts a run, or neither says what beta is; all models at once.
    """
    typed = {"beta": settings.beta, "average_logps": settings.average_logps}
    scales: dict[str, RewardScale] = {}
    errors = []
    for name, respondent in respondents.items():
        if name == settings.reference:
            continue
        loss = run_config(respondent.path).get("loss", {})
        known = {key: loss[key] for key in ("beta", "average_logps", "reference_free") if key in loss}
        errors += [
            f"rewards.{key}={value}: models.{name}.path={respondent.path} was trained with loss.{key}={known[key]}, as "
            f"its config.yaml says; leave rewards.{key} out"
            for key, value in typed.items()
            if value is not None and value != known.get(key, value)
        ]
        chosen = {key: value for key, value in typed.items() if value is not None} | known
        if "beta" in chosen:
            scales[name] = RewardScale(**chosen)
        else:
            errors.append(
                f"rewards.beta is not set, and models.{name}.path={respondent.path} is not part of a run of train.py "
                "that would say with which loss.beta it was trained: write rewards.beta=NUMBER"
            )
    if errors:
        raise UserError("\n".join(errors))
    return scales


def reward_margins(logps: Tensor, reference_logps: Tensor, num_tokens: Tensor, scale: RewardScale) -> list[float]:
    """Return reward(chosen) - reward(rejected) of each pair, in nats.

    Args:
        logps: Log-probabilities of chosen and rejected by the model, (N, 2).
        reference_logps: The same by the reference, (N, 2).
        num_tokens: Tokens of chosen and rejected, (N, 2).
        scale: How the model was trained.
    """
    ratios = logps if scale.reference_free else logps - reference_logps
    if scale.average_logps:
        ratios = ratios / num_tokens.clamp(min=1)
    return (scale.beta * (ratios[:, 0] - ratios[:, 1])).tolist()


def describe_rewards(
    margins: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    scales: Mapping[str, RewardScale],
    trained_on: Mapping[str, int],
    settings: RewardSettings,
) -> dict[str, Any]:
    """Build the part of the report: accuracy, margins and calibration of every model but the reference.

    Args:
        margins: Of each model, one for each pair.
        labels: Of the pairs, "" for one without.
        scales: Of each model.
        trained_on: For each model how many of the pairs it was trained on.
        settings: The file of the pairs, and the reference.
    """
    betas = {scale.beta for scale in scales.values()}
    return {
        "reference": settings.reference,
        "beta": betas.pop() if len(betas) == 1 else None,  # None: each model has its own
        "path": settings.path,
        "trained_on": dict(trained_on),
        "models": {
            name: {**check_rewards(of_model, labels), **asdict(scales[name])} for name, of_model in margins.items()
        },
    }


def trained_on_notes(part: Mapping[str, Any]) -> Iterator[str]:
    """Say which models were trained on pairs that were to be held out."""
    num_pairs = next(iter(part["models"].values()))["n"]
    for name, count in part["trained_on"].items():
        if count:
            yield (
                f"{name} was trained on the instructions of {count} of the {num_pairs} pairs in {part['path']}: its "
                "rewards there are no evidence for pairs that it has not seen."
            )


def count_trained_on(respondents: Mapping[str, Respondent], pairs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Count for each model the pairs whose instruction its run was trained on; 0 where the run or its data is gone.

    Args:
        respondents: The models, the reference too: it may have been trained on the chosen responses.
        pairs: The ids of the pairs, by `instruction_key`.
    """
    counts = {}
    for name, respondent in respondents.items():
        overlaps = find_training_overlap(respondent.path, pairs)
        counts[name] = len({id for overlap in overlaps for id in overlap.prompt_ids})
    return counts
