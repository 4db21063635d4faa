"""RMS normalisation with fewer passes over memory, for CPUs, where a step waits for those.

Written in its parts, as the models of transformers have it, every part is read and written for itself, twice again in
the backward pass, and the normalised states are kept. With r = (mean(x^2) + eps)^-1/2 (Zhang and Sennrich 2019, eq. 4):

    y = x r w        dx = r (w dy - x r mean(x r w dy))        dw = sum of x r dy
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _RMSNorm(torch.autograd.Function):
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
        grad_weight = products.flatten(0, -2).sum(0)
        return normed.mul_(mean).addcmul_(grad, weight_D).mul_(rate), grad_weight, None


rms_norm = _RMSNorm.apply


def _forward(module: Any, x: Tensor) -> Any:
    if x.dtype == module.weight.dtype == torch.float32:
        return rms_norm(x, module.weight, module.variance_epsilon)
    return type(module).forward(module, x)  # which rounds to float32 inside, and that is not done again here


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    """Whether it computes the formula: tried on random numbers, so small that another eps would be seen.

    The weight is random, too: the module's own may be on no device yet.
    """
    if set(module._parameters) != {"weight"} or not hasattr(module, "variance_epsilon"):
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, generator=generator), 1e-3 * torch.randn(4, 8, generator=generator)
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(weight)}
    found = type(module).forward(probe, x)
    return torch.allclose(found, rms_norm(x, weight, module.variance_epsilon), rtol=1e-5, atol=1e-7)


def use_fast_norms(model: nn.Module) -> None:
    """Replaces the forward pass of the RMS norms of a model, in place; other norms stay as they are."""
    for module in model.modules():
        if _is_rms_norm(module):
            module.forward = MethodType(_forward, module)  # of this one alone
