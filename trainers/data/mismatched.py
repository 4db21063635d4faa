"""Rows of judged answers with a mismatched answer (that of another row), which KTO needs to estimate the KL divergence.

A row [prompt | answer] becomes [prompt | own answer | another row's answer]. This is the shape of a pair, so packing,
reference cache and attention are shared with pairs, and the second response costs only its own tokens.

Letters: N rows of a store.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from config.errors import UserError
from trainers.data.token_store import TokenStore, sequence_lengths


class MismatchedStore(TokenStore):
    """A view of a store of (prompt, answer) rows, with the answer of a partner row as a third segment.

    A partner's answer is truncated if it would make a sequence longer than the longest one of the store.
    """

    def __init__(self, store: TokenStore, partners: Tensor) -> None:
        """Take a store of N rows of two segments, and the partner of each row, (N,) int64."""
        self.__dict__.update(store.__dict__)
        room = sequence_lengths(store.lengths).max() - store.lengths[:, 0].long()
        others = torch.minimum(store.lengths[partners, 1].long(), room).int()
        self.num_segments = 3
        self.lengths = torch.cat([store.lengths, others[:, None]], dim=1)
        self.key, self.content = f"{store.key}-mismatched", f"{store.content}-mismatched"
        self._all, self._places, self._partners = store, torch.arange(len(store)), partners

    def row(self, i: int) -> list[Tensor]:
        """Return prompt, own answer and the partner's of row i, each (T,) int32."""
        _, other = self._all.row(int(self._partners[i]))
        return [*self._all.row(int(self._places[i])), other[: int(self.lengths[i, 2])]]

    def select(self, rows: Tensor) -> Self:
        """Return a store of these rows, in this order; each keeps its partner, selected or not."""
        chosen = super().select(rows)
        chosen._places, chosen._partners = self._places[rows], self._partners[rows]
        return chosen


def with_mismatched(store: TokenStore) -> TokenStore:
    """Return the store with another row's answer added to each row; return an empty store unchanged.

    The partner is the next row, in a random order that depends only on the number of rows, so that the answers of a
    batch follow the distribution of the data. If it has the same prompt, take the first one after it that differs.

    Raises:
        UserError: If all rows have the same prompt.
    """
    if not len(store):
        return store
    prompts = torch.tensor([xxh3_64_intdigest(store.row(i)[0].numpy().tobytes()) >> 1 for i in range(len(store))])
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(0))
    prompts = prompts[order]
    places = torch.arange(len(store))
    partners = places.roll(-1)
    for _ in range(len(store)):
        same = prompts == prompts[partners]
        if not same.any():
            return MismatchedStore(store, torch.empty_like(order).index_copy_(0, order, order[partners]))
        partners = torch.where(same, (partners + 1) % len(store), partners)
    raise UserError(
        f"loss=kto: all {len(store)} rows of a split have the same prompt, but the loss needs answers to other "
        "prompts; add rows, hold out more of them (datasets.NAME.eval_fraction) or none, or use "
        "loss=apo_zero_unpaired, which does not need them"
    )
