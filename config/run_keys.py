"""Which settings identify a run of train.py: compare two runs by them, and name what belongs to a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import xxhash
import yaml

# Keys that do not affect the trained weights: a command may change them and still resume the run.
FREE_KEYS = (
    "exp_name", "run_dir", "local_run_dir", "local_dirs", "device", "fsdp_port", "debug", "dry_run", "log_text",
    "minimum_log_interval_secs", "on_non_finite", "wandb", "checkpoint", "push_to_hub", "license",
    "sweep_metric",
    # These affect only rounding: how the same batches are split and laid out.
    "trainer", "gradient_accumulation_steps", "max_tokens_per_microbatch", "activation_checkpointing",
)  # fmt: skip


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested config as (key, value) of the command line: ("loss.beta", 0.1)."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a resumed run must share, as read back from its config.yaml."""
    # Through YAML once, as the stored settings were, so that tuples and the like compare equal.
    stored = yaml.safe_load(yaml.safe_dump(dict(config))) or {}
    return {key: value for key, value in flatten(stored) if key.split(".")[0] not in FREE_KEYS}


def differing_keys(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return one line for each key that would change the result: "loss.beta: 0.1 there, 0.5 now"."""
    before, now = binding(stored), binding(given)
    lines = []
    for key in sorted(before.keys() | now.keys()):
        there, here = before.get(key, "(absent)"), now.get(key, "(absent)")
        if there != here:
            lines.append(f"{key}: {there} there, {here} now")
    return lines


def checkpoint_owner(config: Mapping[str, Any], name: str) -> str:
    """Return the owner of a checkpoint for its checksums: a hash of the run's settings, and its name (`step-800`)."""
    settings = json.dumps(binding(config), sort_keys=True, default=str)
    return f"run {xxhash.xxh3_64_hexdigest(settings.encode())}, {name}"
