"""Attention of packed rows: each sequence of a micro-batch sees its prefix, its prompt and itself, and nothing else.

Registered with transformers under the name `packed`, so that every architecture that takes its attention from there has
it. The description of a micro-batch travels as the attention mask: transformers asks for a mask once a forward pass,
gets a `PackedLayout`, and hands it to every layer, also where a layer is run again by activation checkpointing. A
forward pass outside of `packed_layout` (generation, padded batches) is the `sdpa` of transformers.

Which kernel runs follows from device, dtype and rows alone (`kernel_for`): on a GPU `flex_attention` with a block mask,
or, where each row is one sequence by itself and 16 bits wide, torch's variable-length flash attention; elsewhere one
call of scaled dot product attention for each row (flex_attention has no backward pass on a CPU). What a kernel
cannot do (soft caps, sinks, biases, dropout) is refused, and `check_packed_attention` compares each model with itself,
unpacked.

Letters: B = rows, S = segments of a row, T = positions of the micro-batch, H = heads, D = size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from config.errors import UserError

PACKED = "packed"
ATTENTION_ARGUMENTS = {"softcap", "s_aux", "position_bias"}  # of some layers of transformers; no kernel here has them
# Positions of a row that attends in one call on a CPU; a longer one gains more from a call for each response, the first
# of which needs no mask and skips half of the scores.
ONE_CALL = 1024


class PackedMask(NamedTuple):
    """What the layers get as their attention mask."""

    layout: PackedLayout
    window: int | None  # positions that a token sees, itself included; None: all before it


class Call(NamedTuple):
    """One call of scaled dot product attention on the CPU."""

    num_queries: int
    mask: Tensor | None  # (queries, keys), added to the scores; None: causal


class Piece(NamedTuple):
    """Consecutive positions that attend on the CPU: of a row, or of a prefix."""

    length: int
    prefix: int | None  # the piece whose positions are seen, too
    calls: list[Call]


class PackedLayout:
    """Where the sequences of a packed micro-batch lie; makes the masks that keep them apart, once for all layers."""

    def __init__(
        self, lengths: Tensor, num_positions: int, prefix_lengths: Tensor | None = None,
        prefix_rows: Tensor | None = None, needed: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Takes T, and what `collate_packed` says of lengths, prefixes and needed positions; waits for no device."""
        self.num_positions, self.needed = num_positions, needed
        self.device, self.num_segments = lengths.device, lengths.shape[1]
        self.one_sequence = self.num_segments == 2 and prefix_rows is None  # each row by itself
        numbers = torch.arange(len(lengths), device=self.device)
        self._prefix_rows = numbers if prefix_rows is None else prefix_rows
        before = torch.zeros_like(numbers) if prefix_lengths is None else prefix_lengths
        # (B, S + 1): what stands before the row, prompt, responses; the positions of each go on from what it sees.
        self._lengths = torch.cat([before[:, None], lengths], dim=1)
        prompt_starts = before[self._prefix_rows]
        starts = torch.stack([torch.zeros_like(before), prompt_starts], dim=1)
        starts = torch.cat([starts, (prompt_starts + lengths[:, 0])[:, None].expand(-1, self.num_segments - 1)], dim=1)
        flat = self._lengths.flatten()
        segment = torch.arange(len(flat), device=self.device).repeat_interleave(flat, output_size=num_positions)
        self._row, self._column = segment // (self.num_segments + 1), segment % (self.num_segments + 1)
        self._prefix_row = self._prefix_rows[self._row]
        self._position = torch.arange(num_positions, device=self.device)
        self._position = self._position + (starts.flatten() - (flat.cumsum(0) - flat))[segment]
        self._block_masks: dict[int | None, BlockMask] = {}
        self._pieces: dict[tuple[int | None, torch.dtype], list[Piece]] = {}

    def visible(self, query: Tensor, key: Tensor, window: int | None) -> Tensor:
        """Whether the position `query` sees the position `key`; index tensors of any shapes that broadcast."""
        column = self._column[key]
        same_row = (self._row[key] == self._row[query]) & ((column == self._column[query]) | (column == 1))
        distance = self._position[query] - self._position[key]
        seen = (same_row | ((column == 0) & (self._row[key] == self._prefix_row[query]))) & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    def block_mask(self, window: int | None) -> BlockMask:
        """For flex_attention."""
        if window not in self._block_masks:
            size = len(self._position)
            self._block_masks[window] = create_block_mask(
                lambda b, h, query, key: self.visible(query, key, window), None, None, size, size,
                device=str(self.device),
            )  # fmt: skip
        return self._block_masks[window]

    def row_starts(self) -> Tensor:
        """Where each row starts, and the last one ends: (B + 1,) int32, for variable-length attention."""
        return F.pad(self._lengths.sum(1).cumsum(0), (1, 0)).int()

    def pieces(self, window: int | None, dtype: torch.dtype) -> list[Piece]:
        """For attention piece by piece: prefixes, and rows."""
        key = (window, dtype)
        if key not in self._pieces:
            pieces: list[Piece] = []
            holders: dict[int, tuple[int, Tensor]] = {}  # row -> its prefix as a piece, and where that stands
            place = torch.arange(len(self._position), device=self.device)
            rows = zip(self._prefix_rows.tolist(), self._lengths.tolist(), strict=True)
            for i, (holder, (before, prompt, first, *others)) in enumerate(rows):
                size = prompt + first + sum(others)
                prefix, own, place = place.split([before, size, len(place) - before - size])
                if before:
                    holders[i] = (len(pieces), prefix)
                    pieces.append(Piece(before, None, [self._call(prefix, prefix, window, dtype)]))
                number, prefix = holders.get(holder, (None, place[:0]))
                calls, stop = [], 0
                for queries in own.split([size] if size <= ONE_CALL else [prompt + first, *others]):
                    stop += len(queries)
                    # Keys of others between are masked: a copy of those that count would cost more.
                    calls.append(self._call(queries, torch.cat([prefix, own[:stop]]), window, dtype))
                pieces.append(Piece(size, number, [call for call in calls if call.num_queries]))
            self._pieces[key] = pieces
        return self._pieces[key]

    def _call(self, queries: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Call:
        """One call, for positions of queries and keys."""
        seen = self.visible(queries[:, None], keys, window)
        if torch.equal(seen, torch.ones_like(seen).tril()):
            return Call(len(queries), None)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
        return Call(len(queries), mask)


# Queries (1, H, T, D), keys and values of H or fewer heads, layout, scale, window -> (1, T, H, D).
Kernel = Callable[[Tensor, Tensor, Tensor, PackedLayout, float | None, int | None], Tensor]

_current: ContextVar[PackedLayout | None] = ContextVar("layout of the forward pass", default=None)


@contextmanager
def packed_layout(layout: PackedLayout) -> Iterator[None]:
    """What `packed` models attend by in the forward passes inside of it, which take no attention mask."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)


def _mask(*arguments: Any, **keywords: Any) -> PackedMask | Tensor | None:
    """What transformers calls for a mask, once for the full and once for the sliding layers."""
    layout = _current.get()
    if layout is None:
        return sdpa_mask(*arguments, **keywords)
    window = keywords.get("local_size")
    if layout.device.type == "cuda" and not layout.one_sequence:
        layout.block_mask(window)  # made here: the layers may be compiled
    return PackedMask(layout, window)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: PackedMask | Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None, **keywords: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """(1, H, T, D) queries, and keys and values of H or fewer heads -> (1, T, H, D)."""
    if not isinstance(attention_mask, PackedMask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **keywords,
        )  # fmt: skip
    layout, window = attention_mask
    refused = [name for name in ATTENTION_ARGUMENTS if keywords.get(name) is not None] + ["dropout"] * (dropout > 0)
    if sliding_window != window:  # chunks, or a layer and a mask that do not belong together
        refused.append(f"a window of {sliding_window} under a mask of {window}")
    if refused:
        raise UserError(
            f"{type(module).__name__} attends with {', '.join(refused)}, which packed attention lacks: packing=false"
        )
    kernel = kernel_for(query.device.type, query.dtype, one_sequence=layout.one_sequence)
    return kernel(query, key, value, layout, scaling, window), None


def kernel_for(device: str, dtype: torch.dtype, *, one_sequence: bool) -> Kernel:
    """What computes the attention of packed rows; `one_sequence`: each row is one by itself."""
    if device != "cuda":
        return _piece_by_piece
    return _varlen if one_sequence and dtype.itemsize == 2 else _flex


@torch.compiler.disable  # how many calls there are, and of what size, differs from one micro-batch to the next
def _piece_by_piece(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float | None, window: int | None
) -> Tensor:
    """Scaled dot product attention for each row: no padding, and no work between rows."""
    key, value = _for_each_head(query, key, value)
    pieces = layout.pieces(window, query.dtype)
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


def _for_each_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values repeated, where several heads of queries share them."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float | None, window: int | None
) -> Tensor:
    """Torch's `varlen_attn` where a row is one sequence: no mask at all."""
    starts, size = layout.row_starts(), query.shape[2]  # the longest row is known to the device alone: `size` bounds it
    key, value = _for_each_head(query, key, value)
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    # Its window counts the positions before the query, ours the query's own too.
    sees = (-1 if window is None else window - 1, 0)
    output = varlen_attn(q, k, v, starts, starts, size, size, scale=scale, window_size=sees)
    assert isinstance(output, Tensor)  # a tuple where more than the output is asked for
    return output[None]


@cache
def _compiled_flex() -> Any:
    """Compiled once, and again for the first other size: from then on for any."""
    return torch.compile(flex_attention)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float | None, window: int | None
) -> Tensor:
    """`flex_attention`, which skips the blocks that hold nothing visible."""
    run = flex_attention if query.device.type == "cpu" else _compiled_flex()  # eager on a CPU: for tests alone
    grouped = query.shape[1] != key.shape[1]
    output = run(query, key, value, block_mask=layout.block_mask(window), scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2)


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, _mask)


def use_packed_attention(model: Any) -> None:
    """Switches a model to `packed`; `check_packed_attention` tells whether that is right for it.

    Raises:
        UserError: for an attention that was asked for and is not this one.
    """
    if model.config._attn_implementation not in (PACKED, "sdpa"):
        raise UserError(
            f"packing=true computes attention by itself; model.attn_implementation={model.config._attn_implementation} "
            "needs packing=false (slower), or leave model.attn_implementation=sdpa"
        )
    model.set_attn_implementation(PACKED)


def use_needed_positions(block: nn.Module) -> None:
    """Lets the MLP of a model's last block run on the positions alone whose states are needed.

    No other block asks for what it adds to the states of a prompt, and neither does the head: that MLP is to response
    rows what the head is. Found by its name, which all architectures tested share; the check of packed states tells
    whether it treats each position by itself.
    """
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module):
        return
    now: list[tuple[Tensor, int]] = []  # the needed positions, and of how many

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        # From the mask, which comes along also where checkpointing runs the block again.
        masks = (one for one in (*arguments, *keywords.values()) if isinstance(one, PackedMask))
        now[:] = [(layout.needed, layout.num_positions) for layout, _ in masks if layout.needed is not None]

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


# Positions of a common prefix, and the segments of a few rows: of two responses, and of one, for which another kernel
# may run where no prefix is shared.
CHECKED_ROWS = ((0, [(3, 4, 2), (2, 1, 5)]), (0, [(3, 4), (2, 5)]), (3, [(3, 4, 2), (2, 1, 5)]))
NOT_NEEDED = [0, 4, 8]  # positions of the last of these whose states are not asked for


@torch.no_grad()
def packed_and_alone(model: Any, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states of packed rows, and of each of their sequences alone: (P, D) each, what is shared once.

    All states, and those of the last rows once more where only some are needed.
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    packed, alone = [], []
    for num_shared, shapes in CHECKED_ROWS:
        prefix, *ids = (
            torch.randint(vocabulary, (length,), generator=generator).to(device)
            for length in (num_shared, *map(sum, shapes))
        )
        positions = []
        for i, (row, shape) in enumerate(zip(ids, shapes, strict=True)):
            before, *responses = row.split(shape)
            for n, response in enumerate(responses):
                sequence = torch.cat([prefix, before, response])
                states = model.base_model(input_ids=sequence[None], use_cache=False).last_hidden_state[0]
                skipped = len(sequence) - len(response) if n else num_shared if i else 0
                alone.append(states[skipped:])
                positions.append(torch.arange(skipped, len(sequence), device=device))
        batch = {
            "input_ids": torch.cat([prefix, *ids]),
            "position_ids": torch.cat(positions),
            "lengths": torch.tensor(shapes, device=device),
        }
        if num_shared:
            batch["prefix_lengths"] = torch.tensor([num_shared] + [0] * (len(shapes) - 1), device=device)
            batch["prefix_rows"] = torch.zeros(len(shapes), dtype=torch.int64, device=device)
        packed.append(packed_states(model, batch))
    needed = torch.ones(len(packed[-1]), dtype=torch.bool, device=device)
    needed[NOT_NEEDED] = False
    needed = needed.nonzero().squeeze(1)
    packed.append(packed_states(model, {**batch, "needed": needed})[needed])
    alone.append(torch.cat(alone)[-len(needed) - len(NOT_NEEDED) :][needed])
    return torch.cat(packed), torch.cat(alone)


def check_packed_attention(packed: Tensor, alone: Tensor, name: str) -> None:
    """Compares the two results of `packed_and_alone`, up to the rounding of their dtype.

    Raises:
        UserError: for a model (of this name) that does not take its attention, mask or positions from where the others
            do.
    """
    error = ((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).max().item()
    tolerance = 1e-3 if alone.dtype.itemsize > 2 else 0.1
    if not error <= tolerance:
        raise UserError(
            f"{name} computes other states for packed rows than for each sequence alone (relative difference "
            f"{error:.1g}, at most {tolerance} is rounding): it does not attend, mask or count positions as Llama, "
            "Mistral, Qwen, GPT-NeoX, GPT-2 and GPT-J do. Write packing=false."
        )


def packed_states(model: Any, batch: Mapping[str, Tensor], embedded_TD: Tensor | None = None) -> Tensor:
    """Last hidden states of packed rows, (T, D), from the tensors of `trainers.data.packing.collate_packed`.

    Where these say which states are `needed`, the others may be anything: see `use_needed_positions`.

    `embedded_TD`: what the model's input embedding returns for them; None: it is asked.
    """
    assert model.config._attn_implementation == PACKED, "use_packed_attention was not called for this model"
    input_ids = batch["input_ids"]
    optional = (batch.get(name, None) for name in ("prefix_lengths", "prefix_rows", "needed"))
    inputs = {"input_ids": input_ids[None]} if embedded_TD is None else {"inputs_embeds": embedded_TD[None]}
    with packed_layout(PackedLayout(batch["lengths"], len(input_ids), *optional)):
        output = model.base_model(**inputs, position_ids=batch["position_ids"][None], use_cache=False)
    return output.last_hidden_state[0]
