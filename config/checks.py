"""Ranges of values and values that do not fit each other, for each entrypoint.

Every function returns all the errors that it finds, each a complete message (rule, value, what to type instead).
Nothing is loaded here: folders are looked at, not read.
"""

from __future__ import annotations

import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from config.paths import find_path
from config.ranges import above, at_least, existing_path, neighbours, one_of, share
from config.settings import (
    MISSING,
    BackendSettings,
    GenerationSettings,
    LocalExpertSettings,
    ModelSettings,
    OpenAIExpertSettings,
    RulesExpertSettings,
    ServerSettings,
)

DTYPES = ("float32", "bfloat16", "float16", "float64")
DEVICES = r"auto|cpu|cuda(:\d+)?"
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")

# What to write for the mandatory values, by the end of their names.
EXAMPLES = {
    "exp_name": "the name of the run, which lives in runs/<exp_name>",
    "model.name_or_path": "the folder of the weights (config.json, *.safetensors), or the model's id on the hub",
    "path": "the file or folder to read",
    "schema": "how its rows read: si | alpaca | hh",
    "output": "the folder to write",
    "generation.server.model": "the name under which the server knows the reversed model",
    "roundtrip.model.name_or_path": "the folder of a model that follows instructions",
    "expert": "one of rules, local, openai",
    "expert.model": "the name under which the server knows the model",
    "expert.model.name_or_path": "the folder of the expert's weights, or its id on the hub",
    "expert.path": "the YAML file of the rules",
}


def check_backend(generation: BackendSettings, key: str = "generation") -> list[str]:
    """How a model is run, its server apart."""
    errors = check_generation(generation, key)
    errors += one_of(f"{key}.backend", generation.backend, ("hf", "vllm", "openai"))
    errors += at_least(f"{key}.vllm.tensor_parallel", generation.vllm.tensor_parallel, 1)
    errors += at_least(f"{key}.vllm.max_length", generation.vllm.max_length, 1)
    return errors + share(f"{key}.vllm.memory_fraction", generation.vllm.memory_fraction)


def missing_values(config: Any, prefix: str = "") -> list[str]:
    """One message for each mandatory value of a settings dataclass that is not set, inner ones included."""
    errors: list[str] = []
    entries = (
        {field.name: config.__dict__[field.name] for field in fields(config)} if is_dataclass(config) else dict(config)
    )
    for name, value in entries.items():
        key = f"{prefix}{name}"
        if key.endswith("expert.generation.server"):
            continue  # needed by one backend alone: `_check_own_server`
        if isinstance(value, str) and value == MISSING:
            words = EXAMPLES.get(key) or EXAMPLES.get(name) or "a value"
            errors.append(f"{key} is not set: write {key}=..., {words}")
        elif is_dataclass(value) or isinstance(value, dict):
            errors += missing_values(value, key + ".")
    return errors


def _check_model(model: ModelSettings, key: str) -> list[str]:
    errors = one_of(f"{key}.policy_dtype", model.policy_dtype, DTYPES)
    for name in ("fsdp_policy_mp", "reference_dtype"):
        if model.__dict__[name] is not None:
            errors += one_of(f"{key}.{name}", model.__dict__[name], DTYPES)
    errors += one_of(f"{key}.attn_implementation", model.attn_implementation, ("sdpa", "eager", "flash_attention_2"))
    if model.autocast is not None:
        errors += one_of(f"{key}.autocast", model.autocast, ("bfloat16",))
    errors += check_model_path(f"{key}.name_or_path", model.name_or_path)
    if model.archive is not None and not find_path(model.archive).exists():
        errors.append(
            f"{key}.archive={model.archive}: there is no such file or folder{neighbours(model.archive)}. Give a run, "
            "a checkpoint, a model folder, or a policy.pt"
        )
    return errors


def check_model_path(key: str, value: str) -> list[str]:
    """A model folder that is not there, or holds no weights. What may be an id on the hub is left to the loader."""
    path = find_path(value)
    if value == MISSING or path.is_file():
        return []
    if not path.exists():
        is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) and not value.startswith(".")
        if is_hub_id and not (path.parent != Path(".") and path.parent.is_dir()):
            return []
        return [f"{key}={value}: there is no such folder{neighbours(value)}"]
    if (path / "LATEST").exists() or (path / "model").is_dir():
        return []  # a run or a checkpoint
    if not (path / "config.json").is_file():
        return [f"{key}={value}: the folder has no config.json, so it holds no model"]
    if not any(list(path.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        return [f"{key}={value}: the folder has a config.json but no weights (*.safetensors)"]
    return []


def check_expert(expert: Any) -> list[str]:
    """The settings of an expert, whichever it is."""
    if isinstance(expert, RulesExpertSettings):
        return existing_path("expert.path", expert.path)
    if isinstance(expert, LocalExpertSettings):
        return [
            *_check_model(expert.model, "expert.model"),
            *one_of("expert.template", expert.template, ("alpaca", "hh", "plain", "chat")),
            *check_backend(expert.generation, "expert.generation"),
            *_check_own_server(expert.generation),
        ]
    if isinstance(expert, OpenAIExpertSettings):
        return [*check_server(expert, "expert"), *_check_budget(expert)]
    return []


def _check_own_server(generation: BackendSettings) -> list[str]:
    """The server of `expert=local expert.generation.backend=openai`."""
    if generation.backend != "openai":
        return []
    key = "expert.generation.server"
    named = generation.server.model != MISSING
    unset = [] if named else [f"{key}.model is not set: write {key}.model=..., {EXAMPLES['expert.model']}"]
    return [*unset, *check_server(generation.server, key)]


def check_server(server: ServerSettings, key: str) -> list[str]:
    """The settings of a server, its name and address apart."""
    errors = at_least(f"{key}.concurrency", server.concurrency, 1)
    errors += at_least(f"{key}.max_retries", server.max_retries, 0)
    errors += above(f"{key}.timeout_seconds", server.timeout_seconds, 0)
    errors += above(f"{key}.patience_seconds", server.patience_seconds, 0)
    if not os.environ.get(server.api_key_env):
        errors.append(
            f"the environment variable {server.api_key_env} ({key}.api_key_env) is not set: export the key of the "
            "server there; a server without keys takes any text"
        )
    return errors


def _check_budget(expert: OpenAIExpertSettings) -> list[str]:
    errors = at_least("expert.max_new_tokens", expert.max_new_tokens, 1)
    errors += check_thought_tags(expert.thought_tags, "expert")
    errors += one_of("expert.structured_output", expert.structured_output, ("auto", "always", "never"))
    errors += at_least("expert.price_prompt", expert.price_prompt, 0)
    errors += at_least("expert.price_completion", expert.price_completion, 0)
    for name in ("max_cost", "max_tokens"):
        limit = expert.__dict__[name]
        if limit is not None and not limit > 0:
            errors.append(
                f"expert.{name}={limit}: nothing could be asked; give a limit above 0, or null for none (the stages "
                "that ask no expert are stage=induce and stage=merge)"
            )
    if expert.max_cost is not None and not (expert.price_prompt or expert.price_completion):
        errors.append(
            f"expert.max_cost={expert.max_cost} needs prices to count with: expert.price_prompt=... and "
            "expert.price_completion=..., each of a million tokens"
        )
    return errors


def check_generation(generation: GenerationSettings, key: str) -> list[str]:
    """Decoding parameters out of range."""
    errors = at_least(f"{key}.max_new_tokens", generation.max_new_tokens, 1)
    errors += at_least(f"{key}.temperature", generation.temperature, 0)
    errors += at_least(f"{key}.max_batch_tokens", generation.max_batch_tokens, 1)
    if not 0 < generation.top_p <= 1:
        errors.append(f"{key}.top_p={generation.top_p}: must lie in (0, 1]")
    return errors + check_thought_tags(generation.thought_tags, key)


def check_thought_tags(tags: list[str], key: str) -> list[str]:
    """Pairs of tags that are no pairs."""
    return [
        f"{key}.thought_tags: {tag!r} must be an opening and a closing tag with a space between, such as "
        "'<think> </think>'"
        for tag in tags
        if len(tag.split()) != 2
    ]


def check_device(device: str) -> list[str]:
    """A device that this machine has not."""
    if not re.fullmatch(DEVICES, device):
        return [f"device={device}: must be auto, cpu or cuda"]
    if device.startswith("cuda") and not torch.cuda.is_available():
        return [f"device={device}: no CUDA device is visible to this process; write device=cpu or device=auto"]
    return []
