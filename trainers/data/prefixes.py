"""Shared prefixes of prompts (a template's head, a system prompt), which a packed micro-batch computes only once.

Letters: B = rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainers.data.token_store import TokenStore

MIN_TOKENS = 16  # estimated: below it, copying keys and values for every row costs more than sharing saves


class Prefixes(NamedTuple):
    """The families of B rows: the rows of a family share their first `lengths` tokens."""

    families: Tensor  # (B,) int64: the index of the family's first row
    lengths: Tensor  # (B,) int64: length of the shared prefix; 0 if the row shares none

    def select(self, places: Tensor) -> Prefixes:
        """Return the prefixes among some of the rows, (M,) indices; a family with one row left has no prefix."""
        _, members, counts = self.families[places].unique(return_inverse=True, return_counts=True)
        firsts = torch.full((len(counts),), len(places)).scatter_reduce_(0, members, torch.arange(len(places)), "amin")
        return Prefixes(firsts[members], self.lengths[places] * (counts[members] > 1))


def no_prefixes(num_rows: int) -> Prefixes:
    """Return the prefixes of rows that share nothing."""
    return Prefixes(torch.arange(num_rows), torch.zeros(num_rows, dtype=torch.int64))


def shared_prefixes(store: TokenStore, rows: Tensor) -> Prefixes:
    """Find families of rows (B,) whose prompts share a prefix of MIN_TOKENS tokens or more.

    The prefix excludes the last token of a prompt, because that predicts the first token of the row's responses.
    """
    found = no_prefixes(len(rows))
    room = store.lengths[rows, 0].long() - 1
    places = (room >= MIN_TOKENS).nonzero().squeeze(1)
    if not len(places):
        return found
    beginnings = store.beginnings(rows[places], MIN_TOKENS)
    _, members, counts = beginnings.unique(dim=0, return_inverse=True, return_counts=True)
    for family in (counts > 1).nonzero().squeeze(1):
        own = places[members == family]
        found.families[own] = own[0]
        found.lengths[own] = _common_tokens(store, rows[own], int(room[own].min()))
    return found


def _common_tokens(store: TokenStore, rows: Tensor, limit: int) -> int:
    """Return the length of the longest common prefix of these rows, at most `limit`."""
    beginnings = store.beginnings(rows, limit)
    differs = (beginnings != beginnings[0]).any(dim=0)
    return int(differs.int().argmax()) if differs.any() else limit
