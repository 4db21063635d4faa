"""Attention of packed rows on a CPU: one call of scaled dot product attention for each row, without padding.

flex_attention has no backward pass on a CPU, and would compute what no position sees.

Letters: T = positions of the micro-batch, H = heads, D = size of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.data.layout import PackedLayout, visible

# Positions of a row that attends in one call; a longer one gains more from a call for each response, the first of
# which needs no mask and skips half of the scores.
ONE_CALL = 1024


class Call(NamedTuple):
    """One call of scaled dot product attention."""

    num_queries: int
    mask: Tensor | None  # (queries, keys), added to the scores; None: causal


class Piece(NamedTuple):
    """Consecutive positions that attend together: of a row, or of a prefix."""

    length: int
    prefix: int | None  # the number of the piece whose positions are seen, too
    calls: list[Call]


def pieces_of(layout: PackedLayout, window: int | None, dtype: torch.dtype) -> list[Piece]:
    """Cut a micro-batch into prefixes and rows, with masks for scores of this dtype."""
    pieces: list[Piece] = []
    holders: dict[int, tuple[int, Tensor]] = {}  # row -> the number of its prefix's piece, and the places of that
    place = torch.arange(layout.num_positions)
    rows = zip(layout.prefix_rows.tolist(), layout.lengths.tolist(), strict=True)
    for i, (holder, (before, prompt, first, *others)) in enumerate(rows):
        size = prompt + first + sum(others)
        prefix, own, place = place.split([before, size, len(place) - before - size])
        if before:
            holders[i] = (len(pieces), prefix)
            pieces.append(Piece(before, None, [_call(layout, prefix, prefix, window, dtype)]))
        number, prefix = holders.get(holder, (None, place[:0]))
        calls, stop = [], 0
        for queries in own.split([size] if size <= ONE_CALL else [prompt + first, *others]):
            stop += len(queries)
            # Keys of other responses in between are masked: to copy those that count would cost more.
            calls.append(_call(layout, queries, torch.cat([prefix, own[:stop]]), window, dtype))
        pieces.append(Piece(size, number, [call for call in calls if call.num_queries]))
    return pieces


def _call(layout: PackedLayout, queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Call:
    seen = visible(tuple(layout.table), queries[:, None], keys, window)
    if torch.equal(seen, torch.ones_like(seen).tril()):
        return Call(len(queries), None)
    return Call(len(queries), torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min))


def repeat_for_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat keys and values where several heads of queries share them."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


@torch.compiler.disable  # how many calls there are, and of what size, differs from one micro-batch to the next
def attend_by_pieces(query: Tensor, key: Tensor, value: Tensor, pieces: list[Piece], scale: float | None) -> Tensor:
    """Attend with (1, H, T, D) queries, and keys and values of H or fewer heads: (1, T, H, D)."""
    key, value = repeat_for_heads(query, key, value)
    sizes = [piece.length for piece in pieces]
    # Splits, not slices: the backward pass of a split writes each part once, that of a slice fills a tensor with zeros.
    all_keys, all_values = key.split(sizes, 2), value.split(sizes, 2)
    outputs = []
    for piece, q, k, v in zip(pieces, query.split(sizes, 2), all_keys, all_values, strict=True):
        if piece.prefix is not None:
            k = torch.cat([all_keys[piece.prefix], k], dim=2)
            v = torch.cat([all_values[piece.prefix], v], dim=2)
        stop = k.shape[2] - piece.length
        for call, queries in zip(piece.calls, q.split([call.num_queries for call in piece.calls], 2), strict=True):
            stop += call.num_queries
            keys, values = (k, v) if stop == k.shape[2] else (k[:, :, :stop], v[:, :, :stop])
            output = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=call.mask, is_causal=call.mask is None, scale=scale
            )
            outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)
