"""LoRA (Hu et al. 2021, arXiv:2106.09685) with `peft`: W x + s B A x, with W frozen, in the linear layers of a policy.

peft's layers replace linear layers inside the model, without a `PeftModel` around it. The model keeps its class,
`base_model`, head and blocks, so that attention, log-probabilities, hooks, FSDP and generation work unchanged. Only
this file knows the names of an adapter's tensors, in the model and in peft's folder.

B starts at zero, so the initial policy computes bit for bit the same as its base, which is the reference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from config.checksums import hash_prefix
from config.errors import UserError
from config.settings import LoraSettings

NAME = "default"  # peft's name for a single adapter
WEIGHTS = "adapter_model.safetensors"  # peft's name
BASE = "base.json"  # ours: the config of the base, and the hash of its files
PREFIX = "base_model.model."  # prefix of tensor names in a `PeftModel`


@dataclass(frozen=True)
class Adapter:
    """The adapter of a model."""

    config: Any  # peft's LoraConfig
    names: dict[str, str]  # name of a tensor in peft's file -> name of the parameter in the model


def add_adapter(model: Any, settings: LoraSettings, *, base: str, seed: int) -> None:
    """Put a new adapter into a causal LM, in place, and freeze all other parameters.

    The adapter is at least float32: steps of 1e-5 would be lost in 16-bit weights.

    Args:
        model: Not sharded; the adapter of a model on the meta device is also on meta.
        settings: Without a rank, do nothing.
        base: Name or path of the base model, for peft.
        seed: For the matrices A; the global random state is not changed.

    Raises:
        UserError: If no linear layer's name ends in one of the targets.
    """
    if settings.r is None:
        return
    import peft

    config = peft.LoraConfig(
        r=settings.r, lora_alpha=settings.full_alpha, lora_dropout=settings.dropout, use_rslora=settings.use_rslora,
        use_dora=settings.use_dora, target_modules=targets(model, settings.target_modules), task_type="CAUSAL_LM",
        base_model_name_or_path=base, fan_in_fan_out=any(isinstance(one, Conv1D) for one in model.modules()),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()


def targets(model: Any, asked: list[str] | None) -> list[str]:
    """Return which linear layers get an adapter, by the ends of their names.

    `asked` is the user's choice; None means all linear layers except the output embedding. That never gets an adapter,
    because log-probabilities are computed from its matrix.

    Raises:
        UserError: If no layer has such a name; the message lists the candidates.
    """
    head = model.get_output_embeddings()
    names = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    candidates = sorted({name.rpartition(".")[2] for name in names})
    for target in asked or []:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise UserError(
                f"model.lora.target_modules: no linear layer of {type(model).__name__} has a name that ends in "
                f"{target}; it has {', '.join(candidates)}. Leave the key out to train all of them."
            )
    return asked or candidates


def adapter_of(model: Any) -> Adapter | None:
    """Return the adapter of a model, sharded or not, or None."""
    if not hasattr(model, "peft_config"):
        return None
    import peft

    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    # Skip embeddings: to find out whether they were resized, peft would query the hub.
    stored = peft.get_peft_model_state_dict(model, state_dict=parameters, save_embedding_layers=False)
    return Adapter(model.peft_config[NAME], {PREFIX + name: names[id(one)] for name, one in stored.items()})


def save_adapter(folder: Path, adapter: Adapter, weights: Mapping[str, Tensor], base: Mapping[str, Any]) -> None:
    """Write peft's folder, plus base.json, which identifies the base.

    `weights` are on the host, by the names of the policy's parameters.
    """
    config = deepcopy(adapter.config)
    config.inference_mode = True  # loaded frozen, unless the reader requests otherwise
    config.save_pretrained(folder)
    save_file({stored: weights[name] for stored, name in adapter.names.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / BASE).write_text(json.dumps(base, indent=1) + "\n", encoding="utf-8")


def read_adapter(folder: Path, model: Any) -> dict[str, Tensor]:
    """Return the tensors of peft's folder, by the parameter names of a model with such an adapter.

    Raises:
        UserError: The file is damaged, or does not fit: tensors are missing, unexpected, or of another shape.
    """
    adapter = adapter_of(model)
    assert adapter is not None
    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} is missing or damaged ({error}). Copy it again.") from error
    parameters = dict(model.named_parameters())
    strange = sorted(stored.keys() ^ adapter.names.keys())
    strange += [name for name in stored.keys() & adapter.names.keys()
                if stored[name].shape != parameters[adapter.names[name]].shape]  # fmt: skip
    if strange:
        raise UserError(
            f"the adapter in {folder} does not fit the model and model.lora: {len(strange)} tensors are missing, "
            f"unexpected, or of another shape, the first is {strange[0]}"
        )
    return {adapter.names[name]: tensor for name, tensor in stored.items()}


def start_adapter(model: Any, settings: LoraSettings, trained: Path | None, *, base: str, seed: int) -> str:
    """Add a new adapter (`add_adapter`) to an unsharded model, and load the weights of `trained`, if it is given.

    Returns the part of the reference's key besides the base: "" for a new adapter, which changes no output yet, or a
    hash of the trained tensors. Errors are those of `add_adapter` and `read_adapter`.
    """
    add_adapter(model, settings, base=base, seed=seed)
    if trained is None:
        return ""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_adapter(trained, model).items():
            parameters[name].copy_(tensor)
    return f" {hash_prefix(trained / WEIGHTS)}"


def merged(exporter: nn.Module, adapter: Adapter, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge the adapter into its base; return the weights under the names of the base.

    `exporter` is the base on the meta device; `weights` are on the host, by the names of the policy's parameters. Those
    of the base may be overwritten.
    """
    import peft
    from peft.tuners.lora import LoraLayer

    with torch.device("meta"):  # draws no random numbers, which would disturb the concurrent training
        model = peft.inject_adapter_in_model(deepcopy(adapter.config), deepcopy(exporter))
    model.load_state_dict(weights, assign=True)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    state, left_out = model.state_dict(), set(adapter.names.values())
    return {name.replace(".base_layer.", "."): state[name] for name in weights if name not in left_out}
