"""Implicit rewards: the scale that each model was trained with, and which of the pairs it was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from config.errors import UserError
from config.settings import LOSSES, DatasetSettings, PairLossSettings, PreferenceLossSettings, RewardSettings
from safer_instruct.evaluation.respondents import Respondent
from safer_instruct.generation.weights import run_config
from safer_instruct.measures.reward_checks import check_rewards
from safer_instruct.report.training_runs import find_training_overlap

if TYPE_CHECKING:
    from torch import Tensor

SCALE_KEYS = ("beta", "average_logps", "reference_free")
NO_COLUMN = "\0"  # no file has a column of this name


@dataclass(frozen=True, slots=True)
class RewardScale:
    """How log-probabilities become rewards: the keys of `loss=` that a run was trained with."""

    beta: float
    average_logps: bool = False
    reference_free: bool = False

    def margins(self, logps: Tensor, reference: Tensor, num_tokens: Tensor) -> list[float]:
        """Return reward(chosen) - reward(rejected) in nats from (N, 2) columns of chosen and rejected."""
        ratios = logps if self.reference_free else logps - reference
        if self.average_logps:
            ratios = ratios / num_tokens.clamp(min=1)
        return (self.beta * (ratios[:, 0] - ratios[:, 1])).tolist()


def reward_scales(respondents: Mapping[str, Respondent], settings: RewardSettings) -> dict[str, RewardScale]:
    """Return the scale of every model except the reference: from its run, or for a plain model from the command.

    Raises:
        UserError: The command contradicts a run, or neither gives beta; one message for all models.
    """
    typed = {key: vars(settings)[key] for key in ("beta", "average_logps") if vars(settings)[key] is not None}
    scales: dict[str, RewardScale] = {}
    errors = []
    for name, respondent in respondents.items():
        if name == settings.reference:
            continue
        model = f"models.{name}.path={respondent.path}"
        loss = run_config(respondent.path).get("loss", {})
        trained = {**_fixed(loss), **{key: loss[key] for key in SCALE_KEYS if key in loss}}
        errors += [
            f"rewards.{key}={value}: {model} was trained with loss.{key}={trained[key]}, as its config.yaml says; "
            f"leave rewards.{key} out"
            for key, value in typed.items()
            if value != trained.get(key, value)
        ]
        if "beta" in typed | trained:
            scales[name] = RewardScale(**(typed | trained))
        else:
            errors.append(
                f"rewards.beta is not set, and {model} is not part of a run of train.py, whose config.yaml would hold "
                "loss.beta: write rewards.beta=NUMBER"
            )
    if errors:
        raise UserError("\n".join(errors))
    return scales


def _fixed(loss: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the scale that follow from the kind of a pair loss instead of its settings."""
    kind = LOSSES.get(loss.get("name", ""))
    if kind is None or not issubclass(kind, PairLossSettings) or issubclass(kind, PreferenceLossSettings):
        return {}
    return {"average_logps": kind.normalised, "reference_free": not kind.reads_reference}


def pairs_settings(path: str) -> DatasetSettings:
    """Return settings that read all pairs of a file and hold none out.

    Rows of a file may share an id, so each row is identified by the hash of its texts instead.
    """
    return DatasetSettings(path, "si", exclude="", eval_fraction=0.0, columns={"id": NO_COLUMN})


def join_labels(ids: Iterable[str], labels: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the label of each encoded row.

    Args:
        ids: The ids of these rows, in file order.
        labels: For each id, the labels of all its rows, in file order. Rows that share an id have equal texts, so they
            were all encoded or all dropped.
    """
    queues = {id: iter(of_id) for id, of_id in labels.items()}
    return [next(queues[id]) for id in ids]


def count_trained_on(respondents: Mapping[str, Respondent], pairs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Count, for each model, the pairs (ids by `turn_keys`) whose instruction its run was trained on.

    The reference is counted too: it may have been trained on the chosen responses.
    """
    counts = {}
    for name, respondent in respondents.items():
        overlaps = find_training_overlap(respondent.path, pairs)
        counts[name] = len({id for overlap in overlaps for id in overlap.prompt_ids})
    return counts


def describe_rewards(
    margins: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    scales: Mapping[str, RewardScale],
    trained_on: Mapping[str, int],
    settings: RewardSettings,
) -> dict[str, Any]:
    """Build this part of the report: accuracy, margins and calibration of every model except the reference."""
    betas = {scale.beta for scale in scales.values()}
    return {
        "reference": settings.reference,
        "beta": betas.pop() if len(betas) == 1 else None,  # None: each model has its own
        "path": settings.path,
        "trained_on": dict(trained_on),
        "models": {name: {**check_rewards(margins[name], labels), **asdict(scale)} for name, scale in scales.items()},
    }


def trained_on_notes(part: Mapping[str, Any]) -> Iterator[str]:
    """Yield a note for each model that was trained on some of the held-out pairs."""
    for name, count in part["trained_on"].items():
        if count:
            yield (
                f"{name} was trained on the instructions of {count} of the pairs in {part['path']}: its rewards on "
                "them say nothing about pairs that it has not seen."
            )
