"""Judged answers beside answers to other prompts, which show how far a policy has moved where nothing was judged.

A row [prompt | answer] becomes [prompt | own answer | another row's answer]: the shape of a pair, so that packing,
reference cache and attention are those of pairs, and the second response costs its own tokens alone.

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
    """Rows of a store of (prompt, answer), each with its partner's answer as a third segment, over the same maps.

    No sequence is longer than the store's longest: a partner's answer that would be loses its end.
    """

    def __init__(self, store: TokenStore, partners: Tensor) -> None:
        """Take a store of N rows of two segments, and of each row its partner, (N,) int64."""
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
    """Return the store with another row's answer beside each; one without rows as it is.

    Partners are neighbours in a random order that depends on the number of rows alone: over a batch, answers are then
    drawn as the data has them. Where the neighbour has the same prompt, it is the one behind it.

    Raises:
        UserError: If all rows have one prompt.
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
        f"loss=kto: all {len(store)} rows of a split have the same prompt, and the loss compares with answers to "
        "others; add rows, hold out more of them (datasets.NAME.eval_fraction) or none, or write "
        "loss=apo_zero_unpaired, which does not compare"
    )
