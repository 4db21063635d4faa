"""Checks of an evaluation command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from config.checks import check_device, check_expert, check_lengths, check_server, check_spread, unread_by_expert
from config.rules import MISSING, Fault, check_values, choices, is_below, misfit
from config.settings import EvaluateConfig

RATES = ("generate", "judge", "compare")  # the allowed keys of `rate`


def with_paths(config: EvaluateConfig) -> EvaluateConfig:
    """Return the settings with `path=` filled in for the prompt sets that have none of their own."""
    if config.path is None:
        return config
    sets = {
        name: replace(settings, path=config.path) if settings.path == MISSING else settings
        for name, settings in config.prompts.items()
    }
    return replace(config, prompts=sets)


def check_evaluate(config: EvaluateConfig) -> list[Fault]:
    """Return all faults of an evaluation command."""
    config = with_paths(config)
    unread = ["generation.server.model"]
    for key, expert in (("expert", config.expert), ("second_expert", config.second_expert)):
        unread += unread_by_expert(expert, key)
    faults = [
        *(fault for fault in check_values(config) if not is_below(fault.key, unread)),
        *_check_servers(config),
        *check_expert(config.expert, "expert"),
        *check_expert(config.second_expert, "second_expert"),
        *check_lengths(config.rewards.max_prompt_length, config.rewards.max_length, "rewards."),
        *([] if config.compare else _check_parts(config)),
        *check_spread(config, RATES, elsewhere="compare=" if config.compare else ""),
    ]
    return faults or list(check_device(config.device))


def _check_servers(config: EvaluateConfig) -> Iterator[Fault]:
    """Check that each model has a name on its server, if the models are behind servers."""
    server, is_served = config.generation.server, config.generation.backend == "openai"
    if is_served:
        yield from check_server(server, "generation.server")
    for name, model in config.models.items():
        for key, value in (("served_as", model.served_as), ("base_url", model.base_url)):
            if value is not None and not is_served:
                why = "only generation=openai uses a server; leave it out, or write generation=openai"
                yield misfit(f"models.{name}.{key}", value, why, "generation")
        if is_served and (model.served_as or server.model) == MISSING:
            yield Fault(
                f"models.{name}.served_as",
                f"models.{name}.served_as is not set: write the model's name on the server, or "
                "generation.server.model=NAME once for all models",
                ("generation.server.model",),
            )


def _check_parts(config: EvaluateConfig) -> Iterator[Fault]:
    """Check that the requested parts of an evaluation have everything they need."""
    rewards, generates = config.rewards, config.responses == "generate"
    if config.expert is None and config.prompts:
        yield Fault(
            "expert", "expert is not set: write expert=..., one of rules, local, openai, guard, strongreject, refusals"
        )
    if not config.prompts and not config.downstream.tasks and rewards.path is None:
        yield Fault("prompts", "no prompts: give at least one set with prompts.NAME.path=FILE")
    if not config.models and generates:
        message = "no models: name at least one, models.NAME.path=FOLDER (a model folder, or a run of train.py)"
        yield Fault("models", message, ("responses",))
    if config.models and config.responses == "csv":
        why = "with it, the columns of the prompt files are the models: leave models.* out, or responses=csv"
        yield misfit("responses", config.responses, why)
    if rewards.path is not None and rewards.reference is None:
        message = "rewards.reference is not set: give the NAME in models.NAME that the others were trained from"
        yield Fault("rewards.reference", message)
    named = {"rewards.reference": rewards.reference if rewards.path is not None else None}
    if config.models:
        named["helpfulness.baseline"] = config.helpfulness.baseline
    for key, name in named.items():
        if name is not None and (complaint := choices(*config.models)(name)):
            yield misfit(key, name, complaint, "models")
