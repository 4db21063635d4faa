"""What the training loop does with a model that `parallelize.py` has laid out, whole or sharded."""

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
    """Return this process's shard of a sharded tensor, and any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name; also the buffers that no state dict has: a meta model needs them, too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def fill_model(
    model: nn.Module, state: Mapping[str, Tensor], layout: Layout, names: Collection[str] | None = None
) -> None:
    """Copy a full state into a model, sharded or not; one tensor at a time travels, and of it only the shards.

    Args:
        model: Laid out by `parallelize`; changed in place.
        state: `full_state` of the same model; read in rank 0 only.
        layout: Of the model.
        names: Parameters that are filled, an adapter's; None: all, and the buffers.
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
    """Return copies of parameters and saved buffers on the host, by state-dict name; empty except in rank 0.

    Every process must come here. One parameter at a time is whole on the device. `names`: of those wanted; None: all.
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
    """Begin a copy; from a GPU into page-locked memory, so that it waits for nothing and runs at the bus's speed."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor, non_blocking=True)


def forward_function(model: Any, function: Callable[..., tuple[Tensor, ...]], **options: Any) -> Callable[..., Any]:
    """Return `function(model, ..., **options)` with both bound, run as a forward pass: FSDP gathers the parameters."""
    if not isinstance(model, FSDPModule):
        return partial(function, model, **options)
    module: Any = model  # an FSDPModule is always an nn.Module, which its type does not say
    name = function.__name__

    def fresh(module: Any, *arguments: Any, **more: Any) -> tuple[Tensor, ...]:
        # FSDP puts its hooks on the outputs, and warns of views, on which they could be lost.
        return tuple(value.clone() for value in function(module, *arguments, **options, **more))

    setattr(module, name, MethodType(fresh, module))
    register_fsdp_forward_method(module, name)
    return getattr(module, name)


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back in place.

    After a forward pass without a backward pass, the root's (embeddings, head) stay whole and are the module's
    parameters: an optimizer, a checkpoint or a copy must not take them for the sharded ones.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reduce_gradients_in_backward(model: nn.Module, reduce: bool) -> None:
    """Let the next backward pass sum the gradients over the processes, or leave that to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(reduce)


@contextmanager
def same_logits(model: nn.Module, layout: Layout) -> Iterator[None]:
    """Put rank 0's logits in every process, so that all of them sample the same tokens and make as many passes.

    Sampling from a sharded model is a collective at each token: processes that end at different lengths would wait for
    each other for ever. Between two tokens a request to stop is answered.
    """

    def share(module: nn.Module, arguments: Any, output: Any) -> None:
        share_from_main(output.logits)
        if sum_over_processes(torch.tensor(int(bool(layout.stop)))):  # the same answer in all of them
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
    """Scale the gradients down to a global L2 norm of at most `max_norm`; return (norm before, loss of all processes).

    The squares are summed in float64: in float32 their sum is off by some 1e-5, and differently for each layout. Most
    steps need no scaling, and are spared the second pass over all gradients. To know that, the host waits for the
    device here, once in a step; the loss comes along (`loss_sum` is this process's, a scalar), so that the caller need
    not wait again.
    """
    gradients = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    # On a GPU one read of the gradients, widened in registers; `vector_norm` would write a float64 copy of each.
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float64)
    squares = torch.stack(norms).square().sum().to(layout.device)
    if layout.mesh is not None and layout.mesh.ndim == 2:
        squares /= layout.mesh.size(0)  # each replica has them all
    total, loss = sum_over_processes(torch.stack([squares, loss_sum.detach().double()])).tolist()
    norm = math.sqrt(total)
    scale = max_norm / (norm + 1e-6)
    if scale < 1 and math.isfinite(norm):
        torch._foreach_mul_(gradients, scale)
    return norm, loss


def weights_are_finite(model: nn.Module) -> bool:
    """Tell whether no process holds a NaN or an infinite number in its part of the weights; all must come here."""
    finite = torch.stack([local_part(parameter).isfinite().all() for parameter in model.parameters()])
    return not sum_over_processes((~finite).sum().cpu())
