"""What the training loop does with a model that `parallelize.py` has prepared, sharded or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from trainers.distributed.layout import Layout, share_from_main, sum_over_processes
from trainers.distributed.preemption import Preempted


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor; return any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and all buffers by name, also non-persistent ones, which a model from meta needs too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def fill_model(
    model: nn.Module, state: Mapping[str, Tensor], layout: Layout, names: Collection[str] | None = None
) -> None:
    """Copy a full state into a model, sharded or not; one tensor is sent at a time, and only its shards.

    Args:
        model: Prepared by `parallelize`; changed in place.
        state: `full_state` of the same model; read in rank 0 only.
        layout: Of the model.
        names: Parameters to fill (those of an adapter); None: all parameters and buffers.
    """
    reshard(model)
    for name, parameter in model.named_parameters():
        if names is not None and name not in names:
            continue
        if not isinstance(parameter, DTensor):
            parameter.copy_(state[name])
            continue
        mesh, placements = parameter.device_mesh, parameter.placements
        on = torch.device(mesh.device_type)
        source = state[name].to(on, parameter.dtype) if layout.is_main else None
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=on) if source is None else source
        shard = distribute_tensor(full.detach(), mesh, placements, src_data_rank=0)
        parameter.to_local().copy_(shard.to_local())
    for name, buffer in model.named_buffers() if names is None else ():
        value = buffer.contiguous()
        if layout.is_main:
            value.copy_(state[name])
        share_from_main(value)
        buffer.copy_(value)


def full_parameters(model: nn.Module, layout: Layout, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return host copies of the state dict's full tensors by name in rank 0, and an empty dict in other processes.

    Every process must call it. Only one full parameter is on the device at a time. `names`: tensors to copy; None: all.
    """
    reshard(model)
    result: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if names is not None and name not in names:
            continue
        if id(tensor) not in copies:  # tied: one copy under both names, as `save_pretrained` expects
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            copies[id(tensor)] = _host_copy(full.detach()) if layout.is_main else full.new_empty(0)
        if layout.is_main:
            result[name] = copies[id(tensor)]
    if layout.is_main and layout.device.type == "cuda":
        torch.cuda.synchronize(layout.device)
    return result


def _host_copy(tensor: Tensor) -> Tensor:
    """Start a copy; a GPU tensor goes to pinned memory, asynchronously and at the speed of the bus."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def forward_function(model: Any, function: Callable[..., tuple[Tensor, ...]], **options: Any) -> Callable[..., Any]:
    """Bind `model` and `options` to `function`, as a forward method: calling it makes FSDP gather the parameters."""
    if not isinstance(model, FSDPModule):
        return partial(function, model, **options)
    module: Any = model  # an FSDPModule is always an nn.Module, but its type does not say so
    name = function.__name__

    def fresh(module: Any, *arguments: Any, **more: Any) -> tuple[Tensor, ...]:
        # FSDP registers hooks on the outputs, and warns if they are views, which can lose hooks; so clone them.
        return tuple(value.clone() for value in function(module, *arguments, **options, **more))

    setattr(module, name, MethodType(fresh, module))
    register_fsdp_forward_method(module, name)
    return getattr(module, name)


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back in place.

    After a forward pass without a backward pass, the root's parameters (embeddings, head) remain gathered. An
    optimizer, a checkpoint or a copy must not use these in place of the sharded ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduce_gradients_in_backward(model: nn.Module, reduce: bool) -> None:
    """Set whether the next backward pass sums the gradients over the processes, or leaves that to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)


@contextmanager
def same_logits(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Share rank 0's logits with every process, so that all sample the same tokens in the same number of passes.

    Every token sampled from a sharded model is a collective: processes that stopped at different lengths would
    deadlock. Stop requests are handled between two tokens.
    """

    def share(module: nn.Module, arguments: Any, output: Any) -> None:
        share_from_main(output.logits)
        if sum_over_processes(torch.tensor(int(bool(layout.stop)))):  # the same result in all processes
            raise Preempted

    handle = model.register_forward_hook(share)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, loss_sum: Tensor, layout: Layout
) -> tuple[float, float]:
    """Clip the gradients to a global L2 norm of at most `max_norm`; return (norm before, loss of all processes).

    The squares are summed in float64: in float32 the error is about 1e-5 and depends on the layout. Most steps need no
    scaling, so they skip the second pass over the gradients. To decide that, the host synchronises with the device,
    once per step; the loss (`loss_sum` is this process's part, a scalar) is read in the same synchronisation.
    """
    gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    # On a GPU this reads the gradients once, widening in registers; `vector_norm` would write float64 copies.
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
    squares = torch.stack(norms).square().sum().to(layout.device)
    if layout.mesh is not None and layout.mesh.ndim == 2:
        squares /= layout.mesh.size(0)  # every replica holds all gradients
    total, loss = sum_over_processes(torch.stack([squares, loss_sum.detach().double()])).tolist()
    norm = math.sqrt(total)
    scale = max_norm / (norm + 1e-6)
    if scale < 1 and math.isfinite(norm):
        torch._foreach_mul_(gradients, scale)
    return norm, loss


def weights_are_finite(model: nn.Module) -> bool:
    """Return whether the weights are finite in all processes; every process must call it."""
    finite = torch.stack([local_part(parameter).isfinite().all() for parameter in model.parameters()])
    return not sum_over_processes((~finite).sum().cpu())
