"""What a packed step leaves out or does in fewer passes over memory than the model and autograd would.

- Gradients of the input and the output embedding are added in place to those of the micro-batches before. Autograd
  makes a gradient of the table's size in every micro-batch and adds it up afterwards: with 32,000 tokens and few
  positions that takes as long as some of the matrix products do.
- The MLP of the last block runs on the positions whose states are needed.
- RMS norms, on a CPU.

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
    """Return what a backward pass may add the gradient of a table to by itself, instead of returning it.

    None where autograd has to: for the first gradient, a weight that is computed from another (as under autocast), or
    one whose gradient a hook waits for.
    """
    watched = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return weight.grad if weight.is_leaf and not watched else None


def embed(module: nn.Module, input_ids: Tensor) -> Tensor | None:
    """Return what a plain `nn.Embedding` does, (T,) -> (T, D); its gradient is added to `weight.grad` by `backward()`.

    `torch.autograd.grad` must not be asked for it: it would get None once there is such a gradient. For other modules,
    which may scale, normalise or project, there is None.
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
        if ctx.padding_idx is not None:  # as torch has it: the padding learns nothing, wherever it stands
            grad_TD = grad_TD.masked_fill((input_ids == ctx.padding_idx)[:, None], 0)
        gradient = gradient_so_far(weight_VD)
        added = gradient is not None
        if gradient is None:
            gradient = torch.zeros_like(weight_VD)
        if gradient.is_cuda:
            # index_add_ would add in any order here. The unsafe form does not wait for the device to check the tokens.
            torch._index_put_impl_(gradient, (input_ids,), grad_TD, accumulate=True, unsafe=True)
        else:
            gradient.index_add_(0, input_ids, grad_TD)  # index_put_ would add in any order here, with several threads
        return None, None if added else gradient, None


def use_needed_positions(block: nn.Module) -> None:
    """Run the MLP of a model's last block only on the positions whose states are needed.

    No other block reads what it adds to the states of a prompt, and neither does the head. The MLP is found by its
    name, which all architectures tested share; the check of packed states tells whether it treats each position by
    itself.
    """
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module):
        return
    now: list[tuple[Tensor, int]] = []  # the needed positions, and of how many

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        # From the mask, which is also there when checkpointing runs the block again.
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

    Written in its parts, as the models of transformers have it, every part is read and written for itself, twice again
    in the backward pass, and the normalised states are kept.
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
    return type(module).forward(module, x)  # which rounds to float32 inside, and that is not done again here


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Try whether it computes the formula, on random numbers so small that another eps would be seen.

    The weight is random, too: the module's own may be on no device yet.
    """
    if set(module._parameters) != {"weight"} or not hasattr(module, "variance_epsilon"):
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, generator=generator), 1e-3 * torch.randn(4, 8, generator=generator)
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(weight)}
    try:
        found = type(module).forward(probe, x)
    except PROBE_ERRORS:  # a norm that takes more than its input, such as a gate
        return False
    return torch.allclose(found, rms_norm(x, weight, module.variance_epsilon), rtol=1e-5, atol=1e-7)


def use_fast_norms(model: nn.Module) -> None:
    """Replace the forward pass of the RMS norms of a model, in place; other norms stay as they are."""
    for module in model.modules():
        if _is_rms_norm(module):
            module.forward = MethodType(_forward, module)  # of this one alone
