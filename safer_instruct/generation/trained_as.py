"""How a model was trained, if it comes from a run of train.py, and therefore how to prompt it."""

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
    """Read the datasets that a model was trained on, by name; {} if it does not come from a run of train.py.

    Raises:
        UserError: The run's config.yaml has been edited, and a value has the wrong type.
    """
    try:
        datasets = run_config(path).get("datasets", {})
        return {str(name): _DATASET.validate_python(values) for name, values in datasets.items()}
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "datasets"
        raise UserError(f"config.yaml of {path}: {where}: {fault['msg']}; copy the run again") from error


class AsTrained(NamedTuple):
    """How to prompt a model."""

    template: str
    system: str | None  # the system prompt; None: the row's own, if it has one

    @property
    def identity(self) -> str:
        """Its form in fingerprints."""
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
    """Return `as_trained` for the model that the command configures under `model_key`."""
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
    """Return how to prompt a model: by the command's `template` and `system`, else by those of its run or the default.

    A note is logged if they differ, or may differ, from those used in training. `key.template`, `key.system` and
    `path_key` are the names of the settings and of the path in the command.

    Raises:
        UserError: Its run used several, or the template has no place for the system prompt.
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
        elif trained and not {typed, None} & trained:  # None: trained with whatever system prompts the rows had
            log.warning(
                "note: %s.%s=%s, but %s=%s was trained with %s=%s; leave %s.%s out to prompt it as it was trained",
                key, setting, _shown(typed), path_key, path, setting,
                " and ".join(sorted(map(_shown, trained))), key, setting,
            )  # fmt: skip
    if not found["template"] and default != "chat" and tokenizer.chat_template:
        log.warning(
            "note: %s uses template=%s: there is no run of train.py at %s=%s that says how it was trained, and its "
            "tokenizer has a chat template; write %s.template=chat (or =%s, to confirm the default)",
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
