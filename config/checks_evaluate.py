"""What can be wrong with the values of an evaluation command; as `config/checks.py`, apart for its length."""

from __future__ import annotations

import re
from typing import Any

from config.checks import (
    DTYPES,
    EXAMPLES,
    check_backend,
    check_device,
    check_expert,
    check_model_path,
    check_server,
    missing_values,
)
from config.ranges import above, at_least, existing_path, one_of
from config.settings import MISSING, EvaluateConfig


def check_evaluate(config: EvaluateConfig) -> list[str]:
    """All errors of an evaluation command."""
    errors = [
        *(line for line in missing_values(config) if not line.startswith("generation.server.")),
        *one_of("responses", config.responses, ("generate", "csv")),
        *check_device(config.device),
        *check_backend(config.generation),
        *_check_servers(config),
        *(check_expert(config.expert) if config.expert is not None else []),
        *(re.sub(r"\bexpert\.", "second_expert.", line) for line in _check_second_expert(config.second_expert)),
        *one_of("wandb.mode", config.wandb.mode, ("auto", "online", "offline", "disabled")),
        *_check_evaluation_parts(config),
    ]
    if config.expert is None and config.prompts and not config.compare:
        errors.append(f"expert is not set: write expert=..., {EXAMPLES['expert']}")
    for name, prompts in config.prompts.items():
        errors += existing_path(f"prompts.{name}.path", prompts.path)
        errors += at_least(f"prompts.{name}.max_rows", prompts.max_rows, 1)
        if prompts.kind is not None:
            errors += one_of(f"prompts.{name}.kind", prompts.kind, ("unsafe", "benign", "near"))
    for name, model in config.models.items():
        if model.template is not None:
            errors += one_of(f"models.{name}.template", model.template, ("alpaca", "hh", "plain", "chat"))
        errors += one_of(f"models.{name}.dtype", model.dtype, DTYPES)
        errors += check_model_path(f"models.{name}.path", model.path)
    for path in config.training_data:
        errors += existing_path("training_data", path)
    return errors


def _check_servers(config: EvaluateConfig) -> list[str]:
    """Each model's name at its server, if the models are behind servers."""
    server = config.generation.server
    if config.generation.backend != "openai":
        return [
            f"models.{name}.{key}={value}: only generation=openai asks a server; leave it out, or write that"
            for name, model in config.models.items()
            for key, value in (("served_as", model.served_as), ("base_url", model.base_url))
            if value is not None
        ]
    unnamed = [name for name, model in config.models.items() if (model.served_as or server.model) == MISSING]
    return check_server(server, "generation.server") + [
        f"models.{name}.served_as is not set: write the name under which the server knows the model, or once for all "
        "models generation.server.model=NAME"
        for name in unnamed
    ]


def _check_second_expert(expert: Any) -> list[str]:
    return [] if expert is None else check_expert(expert)


def _check_evaluation_parts(config: EvaluateConfig) -> list[str]:
    """The parts of an evaluation that a command asks for, and what each of them needs."""
    helpfulness, rewards, downstream = config.helpfulness, config.rewards, config.downstream
    errors = at_least("samples_per_set", config.samples_per_set, 0)
    errors += above("rewards.beta", rewards.beta, 0) if rewards.beta is not None else []
    for name in ("max_prompt_length", "batch_size"):
        errors += at_least(f"rewards.{name}", rewards.__dict__[name], 1)
    if rewards.max_prompt_length >= rewards.max_length:
        errors.append(
            f"rewards.max_prompt_length={rewards.max_prompt_length} must be smaller than "
            f"rewards.max_length={rewards.max_length}: that counts prompt and response together"
        )
    for kind in helpfulness.kinds:
        errors += one_of("helpfulness.kinds", kind, ("unsafe", "benign", "near"))
    for name in ("limit", "batch_size"):
        errors += at_least(f"downstream.{name}", downstream.__dict__[name], 1)
    errors += at_least("downstream.num_fewshot", downstream.num_fewshot, 0)
    errors += existing_path("downstream.include_path", downstream.include_path)
    errors += existing_path("rewards.path", rewards.path)
    if config.compare:
        return errors
    if not config.prompts and not downstream.tasks and rewards.path is None:
        errors.append("no prompts: give at least one set with prompts.NAME.path=FILE")
    if not config.models and config.responses == "generate":
        errors.append("no models: name at least one, models.NAME.path=FOLDER (a model folder, or a run of train.py)")
    if config.models and config.responses == "csv":
        errors.append(
            "responses=csv takes the columns of the prompt files as models: leave models.* out, or responses=csv"
        )
    if config.models and helpfulness.baseline is not None:
        errors += one_of("helpfulness.baseline", helpfulness.baseline, list(config.models))
    if rewards.path is not None:
        errors += (
            ["rewards.reference is not set: name the model of models.NAME that the others were trained from"]
            if rewards.reference is None
            else one_of("rewards.reference", rewards.reference, list(config.models))
        )
    return errors
