"""How a model was trained, where it is part of a run of train.py, and so how it is asked."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from config.errors import UserError
from config.settings import DatasetSettings, ModelSettings
from safer_instruct.generation.weights import run_config

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


def run_setting(path: str, setting: str, *, key: str, path_key: str) -> str:
    """Return `template` or `system` as a model was trained with it; "" for one that is not part of a run of train.py.

    `key.template` and `path_key` are what the command calls the setting and the path.

    Raises:
        UserError: Its run has several.
    """
    values = {dataset: vars(settings)[setting] or "" for dataset, settings in run_datasets(path).items()}
    if len(set(values.values())) > 1:
        listed = ", ".join(f"datasets.{dataset}.{setting}={value}" for dataset, value in values.items())
        raise UserError(f"{path_key}={path} was trained with {listed}: choose by {key}.{setting}=NAME")
    return next(iter(values.values()), "")


def model_template(
    model: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    *,
    key: str,
    model_key: str,
    default: str = DEFAULT_TEMPLATE,
) -> str:
    """Return the template of `as_trained` for a model that the command describes under `model_key`."""
    path_key = f"{model_key}.{'archive' if model.archive else 'name_or_path'}"
    path = model.archive or model.name_or_path
    return as_trained(path, tokenizer, template, key=key, path_key=path_key, default=default)


def as_trained(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    *,
    key: str,
    path_key: str,
    default: str = DEFAULT_TEMPLATE,
) -> str:
    """Return the template that a model is asked with: `template` (of the command), that of its run, or the default.

    What is, or may be, another one than it was trained with is noted.

    Raises:
        UserError: As `run_setting`.
    """
    if template is not None:
        trained = sorted({one.template for one in run_datasets(path).values()})
        if trained and template not in trained:
            log.warning(
                "note: %s.template=%s, but %s=%s was trained with template=%s; leave %s.template out to ask as it "
                "was trained", key, template, path_key, path, " and ".join(trained), key,
            )  # fmt: skip
        return template
    found = run_setting(path, "template", key=key, path_key=path_key)
    if not found and default != "chat" and tokenizer.chat_template:
        log.warning(
            "note: %s is asked with template=%s: no run of train.py round %s=%s tells how it was trained, and its "
            "tokenizer has a chat template; write %s.template=chat (or =%s, to say that it is right)",
            key, default, path_key, path, key, default,
        )  # fmt: skip
    return found or default
