"""How a model was trained, where it is part of a run of train.py, and so how it is asked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from pydantic import TypeAdapter, ValidationError

from config.errors import UserError
from config.settings import DatasetSettings, ModelSettings
from safer_instruct.generation.weights import run_config
from safer_instruct.text.display import short_name
from safer_instruct.text.examples import short_hash
from safer_instruct.text.prompts import Unusable, render_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_TEMPLATE = "alpaca"
_DATASET = TypeAdapter(DatasetSettings)
log = logging.getLogger(__name__)


def run_datasets(path: str) -> dict[str, DatasetSettings]:
    """Read the datasets that a model was trained on, by name; {} if it is not part of a run of train.py.

    Raises:
        UserError: Its config.yaml has been changed: a value is of another type.
    """
    try:
        datasets = run_config(path).get("datasets", {})
        return {str(name): _DATASET.validate_python(values) for name, values in datasets.items()}
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "datasets"
        raise UserError(f"config.yaml of {path}: {where}: {fault['msg']}; copy the run again") from error


class AsTrained(NamedTuple):
    """How a model is asked."""

    template: str
    system: str | None  # what it is told first; None: what the row says, if anything

    @property
    def identity(self) -> str:
        """What names it in fingerprints."""
        return self.template if self.system is None else f"{self.template}/{short_hash(self.system)}"


def model_as_trained(
    model: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    system: str | None,
    *,
    key: str,
    model_key: str,
    default: str = DEFAULT_TEMPLATE,
) -> AsTrained:
    """Return `as_trained` of a model that the command describes under `model_key`."""
    path_key = f"{model_key}.{'archive' if model.archive else 'name_or_path'}"
    path = model.archive or model.name_or_path
    return as_trained(path, tokenizer, template, system, key=key, path_key=path_key, default=default)


def as_trained(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    system: str | None,
    *,
    key: str,
    path_key: str,
    default: str = DEFAULT_TEMPLATE,
) -> AsTrained:
    """Return how a model is asked: `template` and `system` of the command, else those of its run, else the default.

    What is, or may be, another one than it was trained with is noted. `key.template`, `key.system` and `path_key` are
    what the command calls the settings and the path.

    Raises:
        UserError: Its run has several, or the template has no place for the system prompt.
    """
    datasets = run_datasets(path)
    found = {"template": template, "system": system}
    for setting, typed in found.items():
        values = {dataset: vars(settings)[setting] for dataset, settings in datasets.items()}
        trained = set(values.values())
        if typed is None and len(trained) > 1:
            listed = ", ".join(f"datasets.{dataset}.{setting}={_shown(value)}" for dataset, value in values.items())
            raise UserError(f"{path_key}={path} was trained with {listed}: choose by {key}.{setting}=")
        if typed is None:
            found[setting] = next(iter(trained), None)
        elif trained and not {typed, None} & trained:  # without a system prompt of its own a run had what its rows say
            log.warning(
                "note: %s.%s=%s, but %s=%s was trained with %s=%s; leave %s.%s out to ask as it was trained",
                key, setting, _shown(typed), path_key, path, setting,
                " and ".join(sorted(map(_shown, trained))), key, setting,
            )  # fmt: skip
    if not found["template"] and default != "chat" and tokenizer.chat_template:
        log.warning(
            "note: %s is asked with template=%s: no run of train.py round %s=%s tells how it was trained, and its "
            "tokenizer has a chat template; write %s.template=chat (or =%s, to say that it is right)",
            key, default, path_key, path, key, default,
        )  # fmt: skip
    asked = AsTrained(found["template"] or default, found["system"])
    try:
        if asked.system:
            render_prompt(asked.template, "", tokenizer=tokenizer, system=asked.system)
    except Unusable as error:
        raise UserError(f"{key}.{error}; or write {key}.system='' to ask without it") from error
    return asked


def _shown(value: str | None) -> str:
    return "null" if value is None else short_name(value, 60)
