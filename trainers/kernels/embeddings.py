"""Gradients of the input and the output embedding, added to those of the micro-batches before.

Autograd makes a gradient of the table's size in every micro-batch and adds it up afterwards: with 32,000 tokens and few
positions that takes as long as some of the matrix products do. Here the rows, or the product, are added in place.

Letters: V = vocabulary, D = width, T = positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def gradient_so_far(weight: Tensor) -> Tensor | None:
    """What a backward pass may add the gradient of a table to by itself, instead of returning it.

    None where autograd has to: for the first gradient, a weight that is computed from another (as under autocast), or
    one whose gradient a hook waits for.
    """
    watched = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return weight.grad if weight.is_leaf and not watched else None


def embed(module: nn.Module, input_ids: Tensor) -> Tensor | None:
    """What a plain `nn.Embedding` returns, (T,) -> (T, D); its gradient is added to `weight.grad` by `backward()`.

    `torch.autograd.grad` must not be asked for it: it would get None once there is such a gradient.

    Returns:
        None for other modules, which may scale, normalise or project.
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
        # Not index_add_, whose sums differ from run to run on a GPU.
        gradient.index_put_((input_ids,), grad_TD, accumulate=True)
        return None, None if added else gradient, None
