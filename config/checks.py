"""Shared checks for settings that do not fit each other or this machine. `config/rules.py` checks single values.

Every check yields all faults that it finds. Nothing is loaded here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Any

from config.rules import Fault, misfit, suggest
from config.settings import EvaluateConfig, InduceConfig, LocalExpertSettings, OpenAIExpertSettings, ServerSettings


def check_server(server: ServerSettings, key: str) -> Iterator[Fault]:
    """Check that the API key of a server is set."""
    if not os.environ.get(server.api_key_env):
        yield Fault(
            f"{key}.api_key_env",
            f"the environment variable {server.api_key_env} ({key}.api_key_env) is not set: export the server's API "
            "key there; any text will do for a server without keys",
        )


def check_expert(expert: Any, key: str) -> Iterator[Fault]:
    """Check that an expert can be asked and its budget computed."""
    if isinstance(expert, LocalExpertSettings) and expert.generation.backend == "openai":
        yield from check_server(expert.generation.server, f"{key}.generation.server")
    if not isinstance(expert, OpenAIExpertSettings):
        return
    yield from check_server(expert, key)
    if expert.max_cost is not None and not (expert.price_prompt or expert.price_completion):
        prices = f"{key}.price_prompt", f"{key}.price_completion"
        why = f"it needs prices: {prices[0]}=... and {prices[1]}=..., per million tokens"
        yield misfit(f"{key}.max_cost", expert.max_cost, why, *prices)


def unread_by_expert(expert: Any, key: str) -> list[str]:
    """Return the keys of an expert that its backend does not read."""
    has_server = isinstance(expert, LocalExpertSettings) and expert.generation.backend != "openai"
    return [f"{key}.generation.server"] if has_server else []


def check_lengths(max_prompt_length: int, max_length: int, prefix: str = "") -> Iterator[Fault]:
    """Check that the longest prompt leaves room for a response."""
    if max_prompt_length >= max_length:
        whole = f"{prefix}max_length"
        why = f"must be smaller than {whole}={max_length}, which counts prompt and response together"
        yield misfit(f"{prefix}max_prompt_length", max_prompt_length, why, whole)


def check_spread(config: InduceConfig | EvaluateConfig, rates: Collection[str], *, elsewhere: str) -> Iterator[Fault]:
    """Check that `dry_run`, `rate` and `engine` fit a command.

    `elsewhere` is the word that makes it a command without shards and model calls; "" if it has them.
    """
    uses_ray = config.engine.name == "ray"
    for key, word, is_set in (("dry_run", "dry_run=true", config.dry_run), ("engine.name", "engine=ray", uses_ray)):
        if is_set and elsewhere:
            yield Fault(key, f"{word}: only commands that ask models about rows have it; leave it out with {elsewhere}")
    for name, rate in config.rate.items():
        if name not in rates:
            yield misfit(f"rate.{name}", rate, f"no such stage{suggest(name, rates)} Stages: {', '.join(rates)}")
    if uses_ray and config.shard.count is None:
        message = "engine=ray: how many shards? Write shard.count=N, a few for each worker"
        yield Fault("shard.count", message, ("engine.name",))
    if uses_ray and config.shard.index is not None:
        yield misfit("shard.index", config.shard.index, "engine=ray does all shards; leave it out")


def check_hub(name: str | None) -> Iterator[Fault]:
    """Check that there is a login to the Hugging Face hub if something will be uploaded."""
    if name is not None:
        from huggingface_hub import get_token

        if get_token() is None:
            why = "nobody is logged in to the hub here: `hf auth login`, or export HF_TOKEN=..."
            yield misfit("push_to_hub", name, why)


def check_device(device: str) -> Iterator[Fault]:
    """Check that this machine has a GPU if the command asks for one."""
    if device.startswith("cuda"):
        import torch  # here, because it takes seconds

        if not torch.cuda.is_available():
            why = "no CUDA device is visible to this process; write device=cpu or device=auto"
            yield misfit("device", device, why)
