"""Checks of the loss of a training command, and of its data for that loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from config.rules import MISSING, Fault, check_values, misfit, suggest
from config.settings import (
    LOSSES,
    DatasetSettings,
    LossSettings,
    MixtureSettings,
    PairLossSettings,
    TrainConfig,
    part_settings,
)
from config.settings import PreferenceLossSettings as Modified

PARTS = [name for name, kind in LOSSES.items() if issubclass(kind, PairLossSettings)]


def check_loss(loss: Any) -> Iterator[Fault]:
    """Check that the settings belong to the loss that they name."""
    if loss == MISSING:
        return
    if not isinstance(loss, LossSettings):
        yield Fault("loss", "loss: its YAML file names no settings; `defaults:` begins with /schema/loss/NAME@_here_")
        return
    kind = LOSSES.get(loss.name)
    if kind is None:
        known = f"{suggest(loss.name, LOSSES)} Losses: {', '.join(LOSSES)}"
        yield misfit("loss.name", loss.name, f"there is no such loss{known}")
    elif not isinstance(loss, kind):
        yield misfit("loss.name", loss.name, f"the other keys are another loss's; write loss={loss.name}")
    elif isinstance(loss, MixtureSettings):
        yield from (Fault("loss.parts", message) for message in _mixture_complaints(loss))


def _mixture_complaints(loss: MixtureSettings) -> list[str]:
    """Return what is wrong with names, keys and values of the parts, which Hydra does not check."""
    if len(loss.parts) < 2:
        example = "loss.parts.dpo.weight=0.8 loss.parts.slic.weight=0.2"
        return [f"loss.parts={loss.parts}: name two losses or more, such as {example}"]
    complaints = [complaint for name, keys in loss.parts.items() for complaint in _part_complaints(name, keys)]
    if complaints:
        return complaints
    parts = [part_settings(name, keys)[1] for name, keys in loss.parts.items()]
    alphas = {part.ld_alpha if isinstance(part, Modified) else None for part in parts}
    return ["loss.parts: ld_alpha must be the same in all parts, as they share a forward pass"][: len(alphas) - 1]


def _part_complaints(name: str, keys: Any) -> list[str]:
    where = f"loss.parts.{name}"
    if name not in PARTS:
        of_other_rows = f"{name} reads {LOSSES[name].rows}." if name in LOSSES else ""
        why = of_other_rows or f"there is no loss {name}{suggest(name, PARTS)}"
        return [f"{where}: the parts of a mixture are losses on pairs, and {why} Choices: {', '.join(PARTS)}"]
    if not isinstance(keys, dict):
        return [f"{where}={keys}: must be the keys of {name}: {where}={{weight:0.5}}"]
    defaults = {**vars(LOSSES[name]()), "weight": 1.0}
    del defaults["name"]
    complaints = []
    for key, value in keys.items():
        if key not in defaults:
            known = f"{suggest(key, defaults)} Keys: {', '.join(defaults)}"
            complaints.append(f"{where}.{key}={value}: {name} has no key {key}{known}")
        elif not _is_like(value, defaults[key]):
            complaints.append(f"{where}.{key}={value}: must be a value such as {defaults[key]}")
        elif key == "weight" and not value > 0:
            complaints.append(f"{where}.weight={value}: must be above 0")
    return complaints or [fault.message for fault in check_values(part_settings(name, keys)[1], f"{where}.")]


def _is_like(value: Any, default: Any) -> bool:
    """Tell whether a value has the type of a default; a default of null stands for a number or null."""
    if isinstance(default, str | bool):
        return type(value) is type(default)
    return (isinstance(value, int | float) and not isinstance(value, bool)) or (value is None and default is None)


def check_reference(config: TrainConfig) -> Iterator[Fault]:
    """Check that there is a reference to renew."""
    loss, reference = config.loss, config.reference
    key, examples = "reference.refresh_examples", reference.refresh_examples
    if examples is None:
        if reference.refresh_alpha != 1:
            why = f"the reference is never renewed; write {key}=N, too"
            yield misfit("reference.refresh_alpha", reference.refresh_alpha, why, key)
    elif isinstance(loss, LossSettings) and not loss.needs_reference:
        why = f"loss={loss.name} has no reference to renew; leave it out, or write loss=dpo"
        yield misfit(key, examples, why, "loss")
    elif config.model.reference_dtype not in (None, config.model.policy_dtype):
        why = "a renewed reference has the policy's dtype; leave model.reference_dtype out"
        yield misfit(key, examples, why, "model.reference_dtype")


# Schemas that can mark a single answer as good or bad: `unpaired`, and the others in one of their forms.
JUDGED = ("unpaired", "beavertails", "custom")


def check_rows(config: TrainConfig) -> Iterator[Fault]:
    """Check that each dataset has the kind of rows that the loss trains on."""
    if isinstance(config.loss, LossSettings):
        for name, dataset in config.datasets.items():
            yield from _check_rows(f"datasets.{name}", dataset, config.loss)


def _check_rows(key: str, dataset: DatasetSettings, loss: LossSettings) -> Iterator[Fault]:
    schema, split_pairs = f"{key}.schema", f"{key}.split_pairs"
    others = (schema, split_pairs, "loss")
    if loss.rows == "answers" and dataset.schema not in (*JUDGED, MISSING) and not dataset.split_pairs:
        why = (
            f"loss={loss.name} learns from single answers that are good or bad; write {split_pairs}=true to split each "
            f"pair into one of each, or {schema}=unpaired for rows of instruction, response and good"
        )
        yield misfit(schema, dataset.schema, why, *others)
    elif loss.rows != "answers" and dataset.schema == "unpaired":
        why = f"loss={loss.name} cannot learn from its single answers; write loss=kto or loss=apo_zero_unpaired"
        yield misfit(schema, dataset.schema, why, *others)
    elif dataset.split_pairs and (loss.rows != "answers" or dataset.schema == "unpaired"):
        why = "it splits pairs into single answers, for losses such as kto; leave it out"
        yield misfit(split_pairs, True, why, *others)
