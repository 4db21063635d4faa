"""Attention for packed rows on a CPU: one call of scaled dot product attention per row, without padding.

Why not flex_attention? It has no backward pass on a CPU, and would compute scores that are masked.

Letters: T = positions of the micro-batch, H = heads, D = size of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.data.layout import PackedLayout, visible


class Piece(NamedTuple):
    """Consecutive positions that attend in one call: those of a row, or of a prefix."""

    length: int
    prefix: int | None  # index of the piece that is also seen
    mask: Tensor | None  # (queries, keys), added to the scores; None: causal


def pieces_of(layout: PackedLayout, window: int | None, dtype: torch.dtype) -> list[Piece]:
    """Cut a micro-batch into prefixes and rows, with masks for scores of this dtype."""
    pieces: list[Piece] = []
    holders: dict[int, tuple[int, Tensor]] = {}  # row -> index and places of its prefix's piece
    place = torch.arange(layout.num_positions)
    rows = zip(layout.prefix_rows.tolist(), layout.lengths.tolist(), strict=True)
    for i, (holder, (before, *own_lengths)) in enumerate(rows):
        size = sum(own_lengths)
        prefix, own, place = place.split([before, size, len(place) - before - size])
        if before:
            holders[i] = (len(pieces), prefix)
            pieces.append(Piece(before, None, _score_mask(layout, prefix, prefix, window, dtype)))
        number, prefix = holders.get(holder, (None, place[:0]))
        if size:
            keys = torch.cat([prefix, own])
            pieces.append(Piece(size, number, _score_mask(layout, own, keys, window, dtype)))
    return pieces


def _score_mask(
    layout: PackedLayout, queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype
) -> Tensor | None:
    seen = visible(tuple(layout.table), queries[:, None], keys, window)
    if torch.equal(seen, torch.ones_like(seen).tril()):
        return None
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def repeat_for_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat keys and values for grouped-query attention, one copy per query head."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


@torch.compiler.disable  # the number and sizes of the calls differ between micro-batches
def attend_by_pieces(query: Tensor, key: Tensor, value: Tensor, pieces: list[Piece], scale: float | None) -> Tensor:
    """Attend with (1, H, T, D) queries, and keys and values of H or fewer heads: (1, T, H, D)."""
    key, value = repeat_for_heads(query, key, value)
    sizes = [piece.length for piece in pieces]
    # Why not slices? The backward pass of a split writes each part once, that of each slice fills a full-size tensor.
    all_keys, all_values = key.split(sizes, 2), value.split(sizes, 2)
    outputs = []
    for piece, q, k, v in zip(pieces, query.split(sizes, 2), all_keys, all_values, strict=True):
        if piece.prefix is not None:
            k = torch.cat([all_keys[piece.prefix], k], dim=2)
            v = torch.cat([all_values[piece.prefix], v], dim=2)
        mask = None if piece.mask is None else piece.mask.to(q.dtype)  # its dtype may differ from the requested one
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)
