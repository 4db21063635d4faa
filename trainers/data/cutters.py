"""Cut a global batch into micro-batches, packed (`trainers.data.packing`) or padded.

Letters: N rows of a store, B rows of a batch, T padded length, S segments of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from trainers.data.packing import (
    RowSizes,
    balanced_shares,
    collate_packed,
    default_max_tokens,
    input_lengths,
    pack_rows,
)
from trainers.data.prefixes import Prefixes, no_prefixes, shared_prefixes
from trainers.data.token_store import TokenStore, sequence_lengths, split_given

# Limit of positions of a padded micro-batch without gradients, which keeps no activations: 16 pairs of 512 tokens.
PADDED_FORWARD_TOKENS = 16_384


@dataclass(frozen=True)
class Part:
    """A micro-batch before its tensors are made."""

    batch: Tensor  # row numbers of the whole global batch, (B,) int64
    places: list[int]  # indices into `batch` of this micro-batch's rows
    positions: int  # the number of positions that the model is run on
    prefixes: Prefixes  # shared by rows of the whole global batch


@dataclass(frozen=True)
class PackedCutter:
    """Cuts micro-batches without padding that contain the prompt of a pair once, see `collate_packed`."""

    packed: ClassVar[bool] = True
    max_tokens: int  # limit of positions per micro-batch; only a single longer row exceeds it
    num_microbatches: int = 1  # minimum per share; fewer if the share has fewer rows

    def cut(self, store: TokenStore, rows: Tensor, num_shares: int) -> list[list[Part]]:
        """Cut a global batch of these rows (B,) into one share for each rank, and each share into micro-batches.

        Shares are balanced by positions; rows that share a prefix are kept together.
        """
        prefixes = shared_prefixes(store, rows)
        sizes = RowSizes.of(input_lengths(store.lengths[rows].long()).sum(1), prefixes)
        shares = []
        for share in balanced_shares(sizes.own, num_shares):
            packed = pack_rows(sizes.select(share), limit=self.max_tokens, at_least=self.num_microbatches)
            parts = [[share[i] for i in part] for part in packed]
            shares.append([Part(rows, places, sizes.positions(places), prefixes) for places in parts])
        return shares

    def collate(self, store: TokenStore, part: Part, columns: Mapping[str, Tensor]) -> TensorDict:
        """Return the flat tensors of a micro-batch; `columns` are per-row values (N, ...) by name."""
        places = torch.tensor(part.places)
        return collate_packed(store, part.batch[places], columns, part.prefixes.select(places))

    def forward_only(self, device: torch.device) -> PackedCutter:
        """Return the cutter for passes without gradients, which need less memory.

        It depends only on the kind of device, not on the run's limits, so that the runs of a sweep can share a cache.
        """
        return PackedCutter(default_max_tokens(device))


@dataclass(frozen=True)
class PaddedCutter:
    """Cuts micro-batches of right-padded rows."""

    packed: ClassVar[bool] = False
    pad_token_id: int
    max_tokens: int | None = None  # as for packed rows, counting the positions of both sequences; None: no limit
    num_microbatches: int = 1  # per share; fewer if it has fewer rows, more if `max_tokens` requires it

    def cut(self, store: TokenStore, rows: Tensor, num_shares: int) -> list[list[Part]]:
        """Cut as `PackedCutter.cut` does, but deal rows to ranks by length, and group rows of similar length."""
        positions = sequence_lengths(store.lengths[rows]) * (store.num_segments - 1)
        by_length, sizes = torch.argsort(positions, descending=True, stable=True).tolist(), positions.tolist()
        nothing = no_prefixes(len(rows))
        shares = []
        for rank in range(num_shares):
            parts = self._parts(by_length[rank::num_shares], sizes)
            shares.append([Part(rows, places, len(places) * sizes[places[0]], nothing) for places in parts])
        return shares

    def _parts(self, share: list[int], positions: list[int]) -> list[list[int]]:
        """Cut a share, longest row first, into parts of equal row counts (+-1), and split these to fit the limit."""
        num_parts = min(self.num_microbatches, len(share))
        parts: list[list[int]] = []
        start = 0
        for number in range(num_parts):
            stop = start + len(share) // num_parts + (number < len(share) % num_parts)
            while start < stop:
                longest = positions[share[start]]
                fit = stop - start if self.max_tokens is None else max(1, self.max_tokens // longest)
                parts.append(share[start : min(start + fit, stop)])
                start += len(parts[-1])
        return parts

    def collate(self, store: TokenStore, part: Part, columns: Mapping[str, Tensor]) -> TensorDict:
        """Return the tensors of a micro-batch: (B, T) for one response per row, (B, 2, T) for chosen and rejected."""
        rows = part.batch[torch.tensor(part.places)]
        responses = store.num_segments - 1
        shape = (len(rows), responses, int(sequence_lengths(store.lengths[rows]).max()))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.bool)
        response_mask = torch.zeros(shape, dtype=torch.bool)
        for b, row in enumerate(rows.tolist()):
            prompt, *texts = store.row(row)
            start = len(prompt)
            for s, stored in enumerate(texts):
                text, is_given = split_given(stored)
                stop = start + len(text)
                input_ids[b, s, :start] = prompt
                input_ids[b, s, start:stop] = text
                attention_mask[b, s, :stop] = True
                response_mask[b, s, start:stop] = ~is_given
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}
        if responses == 1:
            batch = {name: tensor.squeeze(1) for name, tensor in batch.items()}
        batch |= {name: column[rows] for name, column in columns.items()}
        return TensorDict({**batch, "row": rows}, batch_size=[len(rows)])

    def forward_only(self, device: torch.device) -> PaddedCutter:
        """Return the cutter for passes without gradients, as `PackedCutter.forward_only` does."""
        return PaddedCutter(self.pad_token_id, PADDED_FORWARD_TOKENS)


Cutter = PackedCutter | PaddedCutter


def build_cutter(
    *, packing: bool, device: torch.device, pad_token_id: int, max_tokens: int | None = None, num_microbatches: int = 1
) -> Cutter:
    """Return the cutter for a run; without `max_tokens`, packed rows get the device's default, padded ones no limit."""
    if num_microbatches < 1:
        raise ValueError(f"{num_microbatches=} must be positive")
    if packing:
        return PackedCutter(max_tokens or default_max_tokens(device), num_microbatches)
    return PaddedCutter(pad_token_id, max_tokens, num_microbatches)
