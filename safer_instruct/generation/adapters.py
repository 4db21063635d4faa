"""peft adapters as weights: find them, check them against their base model, and merge them into it.

Training and saving adapters is in `trainers/lora.py`.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import BitsAndBytesConfig, PreTrainedModel

from config.checksums import hash_files
from config.errors import UserError, first_line
from config.paths import find_path
from config.reading import read_mapping
from config.settings import ModelSettings
from safer_instruct.generation.weights import (
    UNUSABLE,
    check_same_architecture,
    check_weight_files,
    is_adapter,
    require_as_saved,
    resolve_archive,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
BASE = "base.json"  # written by train.py: the base's config and the hash of its files


def adapter_in(path: str) -> Path | None:
    """Return the adapter folder that a path stands for (a run, a checkpoint or peft's folder), or None."""
    if not find_path(path).exists():
        return None
    found = resolve_archive(path)
    return found if is_adapter(found) else None


def split_archive(settings: ModelSettings) -> tuple[ModelSettings, Path | None]:
    """Return the base of a policy, and the adapter in its archive that `model.lora` continues to train, if any.

    Raises:
        UserError: The adapter differs from `model.lora`; its target modules are checked later, by its tensors.
    """
    lora = settings.lora
    folder = adapter_in(settings.archive) if lora.r is not None and settings.archive else None
    if folder is None:
        return settings, None
    asked = {"r": lora.r, "lora_alpha": lora.full_alpha, "use_rslora": lora.use_rslora, "use_dora": lora.use_dora}
    stored = read_mapping(folder / CONFIG)
    differing = [
        f"model.lora.{key.removeprefix('lora_')}={value}, and it has {stored.get(key)}"
        for key, value in asked.items()
        if stored.get(key) != value
    ]
    if differing:
        raise UserError(
            f"model.archive={settings.archive} holds an adapter that was trained with other settings than these: "
            f"{'; '.join(differing)}. Give the adapter's values; or train a new one on the merged model of that run "
            "(checkpoint.merge=true)"
        )
    return replace(settings, archive=None), folder


def base_name(settings: ModelSettings) -> str:
    """Return where peft will find the base of the adapter being trained: an absolute folder or a hub id."""
    base, _ = split_archive(settings)
    name = base.archive or base.name_or_path
    return str(resolve_archive(name).resolve()) if find_path(name).exists() else name


def base_of(folder: Path) -> str:
    """Return the path or name of the model that an adapter was trained on.

    Raises:
        UserError: Its config does not name one.
    """
    base = _named_base(folder)
    if not base:
        raise UserError(f"{folder / CONFIG} does not name the base of the adapter; give it: base=FOLDER")
    return base


def _named_base(folder: Path) -> str:
    return str(read_mapping(folder / CONFIG).get("base_model_name_or_path") or "")


def base_hash(name: str) -> str:
    """Return a hash (32 hex digits) of all weight files of a model; "" if it is not on this machine."""
    if not find_path(name).exists():
        return ""
    folder = resolve_archive(name)
    files = [folder] if folder.is_file() else [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return hash_files(sorted(files))


def merge_adapter(model: PreTrainedModel, folder: Path, name: str) -> PreTrainedModel:
    """Merge an adapter into its base, and return the result as a plain model.

    `model`, the base, must be on the CPU and is consumed; `name` is how the user named it.

    Raises:
        UserError: peft is not installed, the adapter is damaged, or it belongs to another base.
    """
    if find_spec("peft") is None:
        raise UserError(f"{folder} holds an adapter, and peft, which reads it, is not installed: pip install peft")
    import peft

    check_weight_files(folder)
    require_as_saved(folder)
    check_base(folder, model.config, name)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing keys are reported below
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
    except UNUSABLE as error:
        raise UserError(f"the adapter {folder} cannot be put into {name}: {first_line(error)}") from error
    strange = stored ^ set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if strange:
        raise UserError(
            f"the adapter {folder} does not fit {name}: {len(strange)} tensors are missing or have no place there, "
            f"first {min(strange)}. Give the model it was trained on: {_named_base(folder) or 'it names none'}"
        )
    merged: PreTrainedModel = adapted.merge_and_unload()
    return merged.requires_grad_(True)


def quantization(kind: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the loader options for a base in 4 bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

    Matrix products are computed in `dtype`; without a `kind` nothing is quantized.
    """
    if kind is None:
        return {}
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": four_bits}


def check_base(folder: Path, config: Any, name: str) -> None:
    """Compare a model with the base recorded in an adapter's folder.

    Raises:
        UserError: It has another architecture, or other weights.
    """
    own = json.loads(config.to_json_string(use_diff=False))
    if (folder / BASE).is_file():
        record = read_mapping(folder / BASE)
        check_same_architecture(own, record["config"], folder, name)
        if record["weights"] and (found := base_hash(name)) not in ("", record["weights"]):
            raise UserError(
                f"the adapter {folder} was trained on other weights than those of {name} ({_named_base(folder)}, files "
                f"with the hash {record['weights'][:8]}, not {found[:8]}). Give that model; if the weights are the "
                f"same in other files, delete {folder / BASE}"
            )
    elif (named := _named_base(folder)) and (there := find_path(named) / "config.json").is_file():
        check_same_architecture(own, read_mapping(there), folder, name)
