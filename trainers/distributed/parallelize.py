"""Prepare a model for training: shortcuts, checkpointing, compilation, and its devices (one, or sharded by FSDP2).

`fully_shard` is applied to each transformer block and then to the whole model, over a mesh of one dimension (shard) or
two (replicate x shard, HSDP). A sharded parameter is a DTensor under its old name, so that the same optimizer, clipping
and saving work for every layout. What the training loop does with a sharded model is in `sharding.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers torch_attn::_varlen_attn
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from config.errors import UserError
from config.settings import TrainerSettings
from trainers.distributed.layout import Layout
from trainers.distributed.sharding import fill_model, full_state
from trainers.kernels.shortcuts import use_fast_norms, use_needed_positions

# The compute-bound operators of a block: matrix products, and attention by any kernel. The others are memory-bound and
# cheap to recompute.
KEPT_BY_SELECTIVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.torch_attn._varlen_attn.default,
]


def find_blocks(model: nn.Module, name: str | None) -> list[nn.Module]:
    """Return the transformer blocks: modules of class `name`, or, for None, the ModuleList with most parameters.

    Raises:
        UserError: if there is no module of that class (the message names candidates) or no list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if name is not None:
        blocks = [module for module in model.modules() if type(module).__name__ == name]
        if not blocks:
            candidates = Counter(type(block).__name__ for blocks in lists for block in blocks)
            listed = ", ".join(f"{kind} ({count})" for kind, count in candidates.most_common())
            raise UserError(
                f"model.block_name={name}: {type(model).__name__} has no such module; its lists hold "
                f"{listed or 'none'}. Leave model.block_name out to find the blocks automatically."
            )
        return blocks
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of blocks; name their class: model.block_name=CLASS.")
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in lists]
    return list(lists[sizes.index(max(sizes))])


def parallelize(
    model: nn.Module, layout: Layout, *, trainer: TrainerSettings, packing: bool, block_name: str | None = None,
    compute_dtype: str | None = None, activation_checkpointing: bool | str = False,
) -> None:  # fmt: skip
    """Apply shortcuts, activation checkpointing, compilation and sharding to a model, in place, in this order and once.

    The model is not sharded yet, and on the meta device if it will be. `compute_dtype` is the compute dtype of a
    sharded model; None: its own dtype. `packing` tells whether rows are packed.
    """
    blocks = find_blocks(model, block_name)
    if packing and not trainer.compile:
        use_needed_positions(blocks[-1])
    if layout.device.type == "cpu" and not trainer.compile:  # torch.compile fuses norms by itself
        use_fast_norms(model)
    if activation_checkpointing not in (False, "none"):
        # Reentrant checkpointing needs inputs that require gradients, so frozen embeddings break it.
        how: dict[str, Any] = {"use_reentrant": False}
        if activation_checkpointing == "selective":
            how["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT_BY_SELECTIVE)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # type: ignore[operator]
    if trainer.compile:
        for block in blocks:
            block.compile()
    if layout.mesh is not None:
        _shard(model, blocks, layout, trainer, compute_dtype)


def _shard(
    model: nn.Module, blocks: list[nn.Module], layout: Layout, trainer: TrainerSettings, compute_dtype: str | None
) -> None:
    options: dict[str, Any] = {
        "mesh": layout.mesh,
        # Inputs keep their dtype, because log-probabilities of the reference must stay float64.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=getattr(torch, compute_dtype) if compute_dtype else None,
            reduce_dtype=torch.float32 if compute_dtype else None,
        ),
        "offload_policy": CPUOffloadPolicy() if trainer.cpu_offload else OffloadPolicy(),
    }
    # A single process gathers nothing, but resharding would repeat its cast to the compute dtype in the backward pass.
    reshard = trainer.reshard_after_forward and layout.world_size > 1
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Sum gradients instead of averaging them: the loss is already divided by the units of all ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def place_model(
    loaded: nn.Module | None, skeleton: Callable[[], nn.Module], prepare: Callable[[nn.Module], None], layout: Layout,
    *, cpu_offload: bool = False,
) -> Any:  # fmt: skip
    """Return a model on its device, laid out: no process but rank 0 ever holds more than its shard and one tensor.

    Except in rank 0, a process never holds more than its shard and one full tensor. `loaded` is the model on the CPU in
    rank 0, and None in the others (`layout.main_only`); `skeleton` makes the same model on the meta device; `prepare`
    is `parallelize` with its other arguments bound. With `cpu_offload` the shards stay in host memory.
    """
    if layout.mesh is None:
        assert loaded is not None
        prepare(loaded)
        return loaded.to(layout.device)
    model = skeleton()
    prepare(model)
    model.to_empty(device=torch.device("cpu") if cpu_offload else layout.device)
    fill_model(model, full_state(loaded) if loaded is not None else {}, layout)
    return model
