"""Attention for packed rows by flash attention, for 16-bit dtypes on a GPU.

Its sequences may have more keys than queries. So a prompt that several responses share is computed once, and only its
keys and values are copied for each response. At the lengths of preference data this is cheaper than a masked kernel,
which works through blocks of 128 x 128 scores, most of them hidden.

Letters: T = positions of the micro-batch, K = keys of all sequences, H = heads, D = size of a head.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from trainers.data.layout import SeenKeys

# For grouped-query attention torch 2.13 requires `enable_gqa`; 2.11 has no such argument and needs none.
GROUPED: dict[str, Any] = dict.fromkeys({"enable_gqa"} & inspect.signature(varlen_attn).parameters.keys(), True)


# Custom operators, which a compiled block calls as they are, for all sizes. One call handles keys and values, because
# each call costs the host tens of microseconds.
@torch.library.custom_op("safer_instruct::copy_keys", mutates_args=())
def copy_keys(
    keys: Tensor, values: Tensor, places: Tensor, by_place: Tensor, copies: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return keys and values (T, H, D) gathered at `places`: (K, H, D) each. The backward pass reads the rest."""
    return keys.index_select(0, places), values.index_select(0, places)


@copy_keys.register_fake
def _(keys: Tensor, values: Tensor, places: Tensor, by_place: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    size = places.shape[0]  # not len(), which a compiled block would treat as a constant
    return keys.new_empty(size, *keys.shape[1:]), values.new_empty(size, *values.shape[1:])


@torch.library.custom_op("safer_instruct::sum_copies", mutates_args=())
def sum_copies(
    grad_keys: Tensor, grad_values: Tensor, by_place: Tensor, copies: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum the gradients (K, H, D) of the copies of each place, for keys and for values: (T, H, D) each.

    Sums are float32, because a prefix may have hundreds of copies, and deterministic, unlike `index_add` on a GPU.
    """
    return _sum(grad_keys, by_place, copies), _sum(grad_values, by_place, copies)


def _sum(grad: Tensor, by_place: Tensor, copies: Tensor) -> Tensor:
    ordered = grad.index_select(0, by_place).to(torch.promote_types(grad.dtype, torch.float32))
    return torch.segment_reduce(ordered, "sum", lengths=copies, unsafe=True, initial=0.0).to(grad.dtype)


@sum_copies.register_fake
def _(grad_keys: Tensor, grad_values: Tensor, by_place: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    size = copies.shape[0]
    return grad_keys.new_empty(size, *grad_keys.shape[1:]), grad_values.new_empty(size, *grad_values.shape[1:])


def _keep_tables(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[3:])


def _copy_keys_backward(ctx: Any, grad_keys: Tensor, grad_values: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.safer_instruct.sum_copies(grad_keys, grad_values, *ctx.saved_tensors), None, None, None


copy_keys.register_autograd(_copy_keys_backward, setup_context=_keep_tables)


def attend_by_flash(
    query: Tensor, key: Tensor, value: Tensor, seen: SeenKeys, window: int | None, scale: float | None
) -> Tensor:
    """Attend with (1, H, T, D) queries, and keys and values of H or fewer heads: (1, T, H, D).

    `seen`: on the device. `window`: positions that a token sees, including itself; None: all before it.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if seen.places is not None:
        assert seen.by_place is not None
        assert seen.copies is not None
        k, v = copy_keys(k, v, seen.places, seen.by_place, seen.copies)
    # Causal means here: aligned at the end, so that the last query sees the last key. The kernel's window counts the
    # positions before the query, ours also counts the query itself.
    sees = (-1 if window is None else window - 1, 0)
    grouped = GROUPED if q.shape[1] != k.shape[1] else {}
    output = varlen_attn(
        q, k, v, seen.query_starts, seen.key_starts, *seen.longest, scale=scale, window_size=sees, **grouped
    )
    assert isinstance(output, Tensor)  # it would be a tuple if more than the output were requested
    return output[None]
