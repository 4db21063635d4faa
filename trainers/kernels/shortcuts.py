"""Shortcuts of a packed step: less computation, or fewer passes over memory, than in the model and autograd.

- Gradients of input and output embeddings are added in place to those of earlier micro-batches. Autograd would make a
  gradient of the table's size in every micro-batch and then add it up: for a vocabulary of 32,000 and few positions,
  that takes as long as some of the matrix products.
- The MLP of the last block runs only on positions whose states are needed.
- On a CPU, RMS norms are fused.

Letters: V = vocabulary, D = width, T = positions.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainers.kernels.attention import PackedMask
from trainers.kernels.self_check import PROBE_ERRORS


def gradient_so_far(weight: Tensor) -> Tensor | None:
    """Return the `.grad` to which a custom backward pass may add the gradient of a table in place.

    Return None if the gradient must be returned to autograd: for the first one, if the weight is computed from another
    (as under autocast), or if a hook waits for its gradient.
    """
    watched = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return weight.grad if weight.is_leaf and not watched else None


def embed(module: nn.Module, input_ids: Tensor) -> Tensor | None:
    """Compute a plain `nn.Embedding`, (T,) -> (T, D); `backward()` adds its gradient to `weight.grad` in place.

    Do not use it with `torch.autograd.grad`, which gets None once `weight.grad` exists. For other modules, which may
    scale, normalise or project, return None.
    """
    if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return None
    output: Tensor = _Embedding.apply(input_ids, module.weight, module.padding_idx)
    return output


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight_VD: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(input_ids, weight_VD)
        ctx.padding_idx = padding_idx
        return F.embedding(input_ids, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        input_ids, weight_VD = ctx.saved_tensors
        if ctx.padding_idx is not None:  # as in torch: padding gets no gradient
            grad_TD = grad_TD.masked_fill((input_ids == ctx.padding_idx)[:, None], 0)
        gradient = gradient_so_far(weight_VD)
        added = gradient is not None
        if gradient is None:
            gradient = torch.zeros_like(weight_VD)
        if gradient.is_cuda:
            # index_add_ is not deterministic on a GPU. `unsafe` skips the index check, which would synchronise.
            torch._index_put_impl_(gradient, (input_ids,), grad_TD, accumulate=True, unsafe=True)
        else:
            gradient.index_add_(0, input_ids, grad_TD)  # index_put_ is not deterministic with several CPU threads
        return None, None if added else gradient, None


def use_needed_positions(block: nn.Module) -> None:
    """Run the MLP of a model's last block only on the positions whose states are needed.

    Its output at prompt positions is read neither by another block nor by the head. The MLP is found by its name, which
    all tested architectures share; `check_packed_attention` verifies that it works position by position.
    """
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module):
        return
    now: list[tuple[Tensor, int]] = []  # the needed positions, and the number of all positions

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        # Read from the mask, which is also passed when checkpointing reruns the block.
        masks = (one for one in (*arguments, *keywords.values()) if isinstance(one, PackedMask))
        now[:] = [(mask.needed, mask.num_positions) for mask in masks if mask.needed is not None]

    def select(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states, *others = arguments
        return (states[0].index_select(0, now[0][0])[None], *others) if now else arguments

    def place(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not now:
            return output
        needed, num_positions = now[0]
        return output.new_zeros(num_positions, output.shape[-1]).index_copy(0, needed, output[0])[None]

    block.register_forward_pre_hook(note, with_kwargs=True)
    mlp.register_forward_pre_hook(select)
    mlp.register_forward_hook(place)


class _RMSNorm(torch.autograd.Function):
    """RMS normalisation (Zhang and Sennrich 2019, eq. 4).

    With r = (mean(x^2) + eps)^-1/2:

        y = x r w        dx = r (w dy - x r mean(x r w dy))        dw = sum of x r dy

    As separate operations, as in transformers' models, each operation reads and writes memory, again twice in the
    backward pass, and the normalised states are kept for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        rate = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, rate)
        return (x * rate).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, rate = ctx.saved_tensors
        normed = x * rate
        products = grad * normed
        mean = (products @ weight_D).unsqueeze(-1).div_(-x.shape[-1])
        grad_weight = products.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return normed.mul_(mean).addcmul_(grad, weight_D).mul_(rate), grad_weight, None


rms_norm = _RMSNorm.apply


def _forward(module: Any, x: Tensor) -> Any:
    if x.dtype == module.weight.dtype == torch.float32:
        return rms_norm(x, module.weight, module.variance_epsilon)
    return type(module).forward(module, x)  # it rounds via float32 inside, which the fast version does not reproduce


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Return whether a module computes the formula, tested on random inputs small enough to show another eps.

    The weight is random too, because the module's own may still be on the meta device.
    """
    if set(module._parameters) != {"weight"} or not hasattr(module, "variance_epsilon"):
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, generator=generator), 1e-3 * torch.randn(4, 8, generator=generator)
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(weight)}
    try:
        found = type(module).forward(probe, x)
    except PROBE_ERRORS:  # a norm with more inputs, such as a gate
        return False
    return torch.allclose(found, rms_norm(x, weight, module.variance_epsilon), rtol=1e-5, atol=1e-7)


def use_fast_norms(model: nn.Module) -> None:
    """Replace the forward pass of a model's RMS norms in place; leave other norms unchanged."""
    for module in model.modules():
        if _is_rms_norm(module):
            module.forward = MethodType(_forward, module)  # of this instance only
