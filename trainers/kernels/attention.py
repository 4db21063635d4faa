"""Attention for packed rows: each sequence of a micro-batch sees its prefix, its prompt and itself, and nothing else.

It is registered with transformers as `packed`, which makes it available to every architecture that uses transformers'
attention interface. The layout of a micro-batch is passed as the attention mask: once per forward pass, transformers
asks for a mask, gets a `PackedMask`, and passes it to every layer, also when activation checkpointing reruns one. A
forward pass outside of `packed_states` (generation, padded batches) uses transformers' `sdpa`.

The kernel depends only on device and dtype (`kernel_for`): on a GPU, flash attention for 16-bit dtypes
(`trainers.kernels.flash_attention`) and `flex_attention` with a block mask for others; elsewhere
`trainers.kernels.cpu_attention`. Unsupported features (soft caps, sinks, biases, dropout) are refused, and
`check_packed_attention` compares each model with itself, unpacked.

Letters: B = rows, S = segments of a row, T = positions of the micro-batch, H = heads, D = size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from config.errors import UserError
from trainers.data.layout import BLOCK, PackedLayout, SeenKeys, visible
from trainers.kernels.cpu_attention import Piece, attend_by_pieces, pieces_of
from trainers.kernels.flash_attention import attend_by_flash

PACKED = "packed"
# What layers of transformers pass beside the mask that changes no score. Anything else that they ask of a kernel (soft
# caps, sinks, biases, blocks of keys) is lacking here, and may show in longer rows than the check of the packed states.
NO_SCORES = {"position_ids", "cache_position", "is_causal"}
# Compilations of flex_attention. Its sizes are dynamic, so that a run needs about three; torch's own limit of 8 is for
# all calls of one process, which a test or a sweep in one process exceeds.
MAX_COMPILATIONS = 64


@dataclass(eq=False)
class PackedMask:
    """The attention mask that the layers receive."""

    kernel: Kernel  # computes the attention; it reads its own fields among those below `window`
    # Compute dtype on a GPU. Under autocast, rotary embeddings return queries and keys in float32, which has no flash
    # kernel and half the speed; so the kernels cast to this.
    dtype: torch.dtype
    needed: Tensor | None  # places whose last hidden states are needed, (N,) int64; None: all
    num_positions: int  # T
    window: int | None  # positions that a token sees, including itself; None: all before it
    flex: Callable[..., Any] = flex_attention
    blocks: BlockMask | None = None
    seen: SeenKeys | None = None
    pieces: list[Piece] = field(default_factory=list)


# Queries (1, H, T, D), keys and values of H or fewer heads, mask, scale -> (1, T, H, D).
Kernel = Callable[[Tensor, Tensor, Tensor, PackedMask, float | None], Tensor]


class ForwardPass(NamedTuple):
    """The packed rows of the current forward pass, from which `_mask` builds the masks that transformers asks for."""

    layout: PackedLayout
    device: torch.device
    needed: Tensor | None


_current: ContextVar[ForwardPass | None] = ContextVar("packed forward pass", default=None)


def kernel_for(device: str, dtype: torch.dtype) -> Kernel:
    """Return the attention kernel for packed rows on a device type, in a dtype."""
    if device != "cuda":
        return _by_pieces
    return _flash if dtype.itemsize == 2 else _flex


def packed_mask(now: ForwardPass, window: int | None, dtype: torch.dtype) -> PackedMask:
    """Return the mask of a forward pass with hidden states of this dtype."""
    layout, device, needed = now
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    kernel = kernel_for(device.type, dtype)
    mask = PackedMask(kernel, dtype, needed, layout.num_positions, window)
    if kernel is _flex:
        # Made here, not in the layer, which may itself be compiled and then takes the finished function as it is.
        mask.flex, mask.blocks = _compiled_flex(), block_mask(layout, window, device)
    elif kernel is _flash:
        mask.seen = _on_device(layout.seen_keys(), device)
    else:
        mask.pieces = pieces_of(layout, window, dtype)
    return mask


def block_mask(layout: PackedLayout, window: int | None, device: torch.device) -> BlockMask:
    """Return the mask for flex_attention. Why not `create_block_mask`? It evaluates all T x T pairs on the device."""
    table = _to_device(layout.table, device).unbind()
    partial, full, partial_of_keys, full_of_keys = _to_device(layout.blocks(window), device).unbind()
    numbers = {"kv": partial, "full_kv": full, "q": partial_of_keys, "full_q": full_of_keys}
    tensors: dict[str, Any] = {}
    for name, blocks in numbers.items():
        tensors[f"{name}_num_blocks"] = blocks[None, None, :, 0].contiguous()
        tensors[f"{name}_indices"] = blocks[None, None, :, 1:].contiguous()
    size = max(layout.num_positions, BLOCK)
    return BlockMask(
        seq_lengths=(size, size), BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=lambda b, h, query, key: visible(table, query, key, window), **tensors,
    )  # fmt: skip


def _on_device(seen: SeenKeys, device: torch.device) -> SeenKeys:
    """Copy the tables to a device as one tensor."""
    tables = {name: table for name, table in seen._asdict().items() if isinstance(table, Tensor)}
    parts = _to_device(torch.cat([*tables.values()]), device).split([len(table) for table in tables.values()])
    return seen._replace(**dict(zip(tables, parts, strict=True)))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy asynchronously; a copy from pageable memory would wait for the device's pending work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _mask(*arguments: Any, **keywords: Any) -> PackedMask | Tensor | None:
    """Make the mask for transformers, which asks once for full-attention and once for sliding-window layers."""
    now = _current.get()
    if now is None:
        return sdpa_mask(*arguments, **keywords)
    return packed_mask(now, keywords.get("local_size"), keywords["dtype"])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: PackedMask | Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None, **keywords: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend with (1, H, T, D) queries, and keys and values of H or fewer heads: (1, T, H, D)."""
    if not isinstance(attention_mask, PackedMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **keywords,
        )  # fmt: skip
    window = attention_mask.window
    refused = [name for name, value in keywords.items() if not (value is None or value is False or name in NO_SCORES)]
    if dropout > 0:
        refused.append("dropout")
    if sliding_window != window:  # chunks, or a layer and a mask that do not belong together
        refused.append(f"a window of {sliding_window} under a mask of {window}")
    if refused:
        raise UserError(
            f"{type(module).__name__} uses {', '.join(refused)}, which packed attention lacks; use packing=false"
        )
    return attention_mask.kernel(query, key, value, attention_mask, scaling), None


def _by_pieces(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scale: float | None) -> Tensor:
    return attend_by_pieces(query, key, value, mask.pieces, scale)


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scale: float | None) -> Tensor:
    query, key, value = (x.to(mask.dtype) for x in (query, key, value))
    assert mask.seen is not None
    return attend_by_flash(query, key, value, mask.seen, mask.window, scale)


@cache
def _compiled_flex() -> Any:
    """Compile flex_attention for dynamic sizes; failures are errors, because eager mode would build T x T scores."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILATIONS)
    # Otherwise the compiler would treat two sizes that happen to be equal (blocks, head size) as always equal.
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _filled_up(states: Tensor) -> Tensor:
    """Pad to a full block of positions, in the memory layout that a projection produces.

    Another memory layout would need another compilation.
    """
    _, heads, size, width = states.shape
    if size >= BLOCK:
        return states
    flat = F.pad(states.transpose(1, 2).flatten(2), (0, 0, 0, BLOCK - size))
    return flat.unflatten(2, (heads, width)).transpose(1, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scale: float | None) -> Tensor:
    """Attend with `flex_attention`, which skips blocks without visible pairs.

    Inputs shorter than a block are padded to one, which saves another compilation.
    """
    size = query.shape[2]
    query, key, value = (_filled_up(x.to(mask.dtype)) for x in (query, key, value))
    output = mask.flex(
        query, key, value, block_mask=mask.blocks, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        # Never the decoding kernel, chosen below 128 positions: it does not support all numbers of heads.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )  # fmt: skip
    return output[:, :, :size].transpose(1, 2)


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, _mask)


def use_packed_attention(model: Any) -> None:
    """Switch a model to `packed` attention; `check_packed_attention` tests whether it computes the same.

    Raises:
        UserError: if another attention was requested, or the model does not use transformers' attention interface.
    """
    if model.config._attn_implementation not in (PACKED, "sdpa"):
        raise UserError(
            f"packing=true has its own attention; model.attn_implementation={model.config._attn_implementation} "
            "needs packing=false (slower), or leave model.attn_implementation=sdpa"
        )
    model.set_attn_implementation(PACKED)
    if model.config._attn_implementation != PACKED:
        raise UserError(f"{type(model).__name__} takes no attention from outside; write packing=false")


def packed_states(model: Any, batch: Mapping[str, Any], embedded_TD: Tensor | None = None) -> Tensor:
    """Return the last hidden states, (T, D), of a batch from `trainers.data.packing.collate_packed`.

    If `batch` has `needed`, only those states are defined: see `use_needed_positions`.

    `embedded_TD`: the input embeddings of the tokens; None: the model computes them.
    """
    assert model.config._attn_implementation == PACKED, "use_packed_attention was not called for this model"
    input_ids = batch["input_ids"][None]
    inputs = {"input_ids": input_ids} if embedded_TD is None else {"inputs_embeds": embedded_TD[None]}
    # Without a mask, transformers would detect packed rows from the positions, which synchronises with the device.
    some_mask = torch.ones_like(input_ids, dtype=torch.bool)
    token = _current.set(ForwardPass(batch["layout"], input_ids.device, batch.get("needed", None)))
    try:
        output = model.base_model(
            **inputs, attention_mask=some_mask, position_ids=batch["position_ids"][None], use_cache=False
        )
    finally:
        _current.reset(token)
    return output.last_hidden_state[0]
