"""How a model is laid out over the processes of a run: whole in one, or sharded by FSDP2.

`fully_shard` on each transformer block and then on the whole model, over a mesh of one dimension (shard) or of two
(replicate x shard, HSDP). A sharded parameter is a DTensor under its old name, so that one optimizer, one clipping and
one way to save serve every layout; all that the training loop must know of a layout is a function here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from config.errors import UserError
from config.settings import TrainConfig
from trainers.distributed.layout import Layout, stop_requested, sum_over_processes
from trainers.distributed.preemption import Preempted
from trainers.kernels.shortcuts import use_fast_norms, use_needed_positions

# What takes the time of a block: its matrix products, and attention by any kernel. The rest waits for memory, and is
# quick to compute again.
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
]


def find_blocks(model: nn.Module, name: str | None) -> list[nn.Module]:
    """The transformer blocks: modules of class `name`, or, for None, the largest list of like modules.

    Raises:
        UserError: if there is no module of that class; the candidates are named.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    candidates = Counter(type(block).__name__ for blocks in lists for block in blocks)
    if name is not None:
        blocks = [module for module in model.modules() if type(module).__name__ == name]
        if not blocks:
            listed = ", ".join(f"{kind} ({count})" for kind, count in candidates.most_common())
            raise UserError(
                f"model.block_name={name}: {type(model).__name__} has no such module; its lists hold "
                f"{listed or 'none'}. Leave model.block_name out: the blocks are found."
            )
        return blocks
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of blocks; name their class: model.block_name=CLASS.")
    sizes = {id(one): sum(parameter.numel() for parameter in one.parameters()) for one in lists}
    return list(max(lists, key=lambda one: sizes[id(one)]))


def parallelize(model: nn.Module, settings: TrainConfig, layout: Layout) -> None:
    """Shortcuts, activation checkpointing, compilation and sharding of a model, in place, in this order and once."""
    blocks = find_blocks(model, settings.model.block_name)
    if settings.packing and not settings.trainer.compile:
        use_needed_positions(blocks[-1])
    if layout.device.type == "cpu" and not settings.trainer.compile:  # a compiler makes its own
        use_fast_norms(model)
    if settings.activation_checkpointing not in (False, "none"):
        # The reentrant kind needs inputs with gradients and breaks with frozen embeddings.
        how: dict[str, Any] = {"use_reentrant": False}
        if settings.activation_checkpointing == "selective":
            how["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT_BY_SELECTIVE)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)  # type: ignore[operator]
    if settings.trainer.compile:
        for block in blocks:
            block.compile()
    if layout.mesh is None:
        return
    compute = settings.model.fsdp_policy_mp
    options: dict[str, Any] = {
        "mesh": layout.mesh,
        # Inputs keep their dtypes: log-probabilities of the reference are float64 and must stay so.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=getattr(torch, compute) if compute else None,
            reduce_dtype=torch.float32 if compute else None,
        ),
        "offload_policy": CPUOffloadPolicy() if settings.trainer.cpu_offload else OffloadPolicy(),
    }
    for block in blocks:
        fully_shard(block, reshard_after_forward=settings.trainer.reshard_after_forward, **options)
    fully_shard(model, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the units of all ranks before: gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def place_model(
    load: Callable[[], nn.Module], skeleton: Callable[[], nn.Module], settings: TrainConfig, layout: Layout
) -> Any:
    """A model on its device, laid out: no process but rank 0 ever holds more of it than its shard and one tensor.

    Args:
        load: reads the model on the CPU; called by rank 0 only where the model is sharded.
        skeleton: the same model on the meta device.
        settings: of the run.
        layout: where to put it.
    """
    if layout.mesh is None:
        model = load()
        parallelize(model, settings, layout)
        return model.to(layout.device)
    state: dict[str, Tensor] = {}
    layout.on_main(lambda: state.update(full_state(load())))
    model = skeleton()
    parallelize(model, settings, layout)
    model.to_empty(device=torch.device("cpu") if settings.trainer.cpu_offload else layout.device)
    fill_model(model, state, layout)
    return model


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name: also buffers that no state dict has, which a meta model must be given too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def fill_model(model: nn.Module, state: Mapping[str, Tensor], layout: Layout) -> None:
    """Copies a full state into a model, sharded or not; one tensor at a time travels, and of it only the shards.

    Args:
        model: laid out by `place_model`; changed in place.
        state: `full_state` of the same model; read in rank 0 only.
        layout: of the model.
    """
    reshard(model)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            parameter.copy_(state[name])
            continue
        mesh, placements = parameter.device_mesh, parameter.placements
        on = torch.device(mesh.device_type)
        source = state[name].to(on, parameter.dtype) if layout.is_main else None
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=on) if source is None else source
        shard = distribute_tensor(full.detach(), mesh, placements, src_data_rank=0)
        parameter.to_local().copy_(shard.to_local())
    for name, buffer in model.named_buffers():
        value = buffer.contiguous()
        if layout.is_main:
            value.copy_(state[name])
        dist.broadcast(value.view(-1).view(torch.uint8), src=0)  # as bytes: gloo has no booleans
        buffer.copy_(value)


def full_parameters(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Copies of all parameters and saved buffers on the host, by the names of the state dict; empty but in rank 0.

    Every process must come here. One parameter at a time is whole on the device.
    """
    reshard(model)
    saved = model.state_dict(keep_vars=True)
    result: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, tensor in saved.items():
        if id(tensor) in seen:  # tied: one copy under both names, as `save_pretrained` expects
            if layout.is_main:
                result[name] = result[seen[id(tensor)]]
            continue
        seen[id(tensor)] = name
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if layout.is_main:
            result[name] = full.detach().to("cpu", copy=True)
    return result


def forward_function(model: Any, function: Callable[..., tuple[Tensor, ...]], **options: Any) -> Callable[..., Any]:
    """`function(model, ..., **options)` with both bound, run as a forward pass: FSDP gathers the parameters."""
    if not isinstance(model, FSDPModule):
        return partial(function, model, **options)
    module: Any = model  # an FSDPModule is always an nn.Module, which its type does not say
    name = function.__name__

    def fresh(module: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # FSDP hangs its hooks on the outputs, and warns of views, on which they could be lost.
        return tuple(value.clone() for value in function(module, *arguments, **options))

    setattr(module, name, MethodType(fresh, module))
    register_fsdp_forward_method(module, name)
    return getattr(module, name)


def reshard(model: nn.Module) -> None:
    """Puts the sharded parameters back in place.

    After a forward pass that no backward pass follows, the root's (embeddings, head) stay whole and are the module's
    parameters: an optimizer, a checkpoint or a copy must not take them for the sharded ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduce_gradients_in_backward(model: nn.Module, reduce: bool) -> None:
    """Whether the next backward pass sums the gradients over the processes, or leaves that to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)


@contextmanager
def same_logits(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Rank 0's logits in every process, so that all of them sample the same tokens and make as many passes.

    Sampling under a sharded model is a collective at each token: processes that end at different lengths would wait
    for each other for ever. Between two tokens a request to stop is answered.
    """

    def share(module: nn.Module, arguments: Any, output: Any) -> None:
        if layout.mesh is not None:
            dist.broadcast(output.logits, src=0)
        if stop_requested(layout):
            raise Preempted

    handle = model.register_forward_hook(share)
    try:
        yield
    finally:
        handle.remove()


def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, loss_sum: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Scales the gradients down to a global L2 norm of at most `max_norm`.

    The squares are summed in float64: in float32 their sum is off by some 1e-5, and differently for each layout.

    Args:
        parameters: sharded or not.
        max_norm: the bound.
        loss_sum: this process's sum of losses, a scalar: it travels with the squares.
        layout: of the parameters.

    Returns:
        the norm before and the sum of losses over all processes, float64 scalars on the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = torch.zeros((), dtype=torch.float64, device=layout.device)
    for gradient in local:
        squares += torch.linalg.vector_norm(gradient, dtype=torch.float64).square().to(layout.device)
    if layout.mesh is not None and layout.mesh.ndim == 2:
        squares /= layout.mesh.size(0)  # each replica has them all
    total, loss = sum_over_processes(torch.stack([squares, loss_sum.detach().double()]))
    norm = total.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in local:
        gradient.mul_(scale.to(gradient.device, gradient.dtype))
    return norm, loss
