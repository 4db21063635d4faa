"""Which settings make two runs of train.py two: their names, their differences, and a key for what has them all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import xxhash
import yaml

# Keys that leave the trained weights as they are: a command may change them and still go on with the run.
FREE_KEYS = (
    "exp_name", "run_dir", "local_run_dir", "local_dirs", "device", "fsdp_port", "debug", "dry_run", "log_text",
    "minimum_log_interval_secs", "on_non_finite", "wandb", "checkpoint", "push_to_hub", "license",
    "sweep_metric",
    # Up to rounding: how the same batches are cut and laid out.
    "trainer", "gradient_accumulation_steps", "max_tokens_per_microbatch", "activation_checkpointing",
)  # fmt: skip


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested config as ("loss.beta", 0.1), the way they are typed."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def binding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a run is bound to, as they are read back from its config.yaml."""
    # Through YAML once, as the stored ones were: tuples and the like compare as what they are read back as.
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
    """Return whose a checkpoint is: that of a run with these settings, under this name (`step-800`)."""
    settings = json.dumps(binding(config), sort_keys=True, default=str)
    return f"run {xxhash.xxh3_64_hexdigest(settings.encode())}, {name}"
