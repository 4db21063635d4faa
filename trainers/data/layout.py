"""The layout of a packed micro-batch: where its sequences are, and which positions see which.

A position sees the shared prefix of its row, the prompt of its row and its own response, up to itself. The layout is
computed on the host, in the thread that prefetches batches, so that no training step synchronises with the GPU.

Letters: B = rows, S = segments of a row (2: prompt and response; 3: prompt, chosen and rejected), T = positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # edge of a block of attention scores: the default of flex_attention, which skips empty blocks


class SeenKeys(NamedTuple):
    """A micro-batch as N causal sequences with at least as many keys as queries: the arguments of flash attention.

    The queries of a sequence are consecutive places with the same context: a prefix, a prompt with its first response,
    or another response. The keys are everything that these see, in the order of positions, so that the queries
    themselves come last. A prefix is thus repeated for each sequence that shares it, and a prompt for each response.
    """

    query_starts: Tensor  # (N + 1,) int32, where the queries of each sequence start in the micro-batch; at the end T
    key_starts: Tensor  # (N + 1,) int32, where its keys start in `places`; at the end K
    longest: tuple[int, int]  # the largest numbers of queries and of keys of a sequence
    # (K,) int32, the place of each key in the micro-batch; None if keys and places are the same (nothing is shared).
    places: Tensor | None = None
    by_place: Tensor | None = None  # (K,) int32, the keys sorted by place
    copies: Tensor | None = None  # (T,) int32, how often each place is a key


class PackedLayout:
    """The segments of a micro-batch, on the host.

    Attributes:
        lengths: (B, S + 1) int64: positions of the prefix stored before the row, of its prompt and its responses.
        prefix_rows: (B,) int64: the row before which the prefix of this row is stored; the row itself if it has none.
        num_positions: T.
        longest_sequence: Positions of the longest sequence, including prefix and prompt.
        table: (4, T or more) int32. For each position: its segment, the segments of its row's prompt and prefix (for a
            prefix: itself), and its position in the sequence. Padded to BLOCK or more columns, a multiple of 64, so
            that each of the four rows is aligned on a GPU.
    """

    def __init__(
        self, lengths: Tensor, prefix_lengths: Tensor | None = None, prefix_rows: Tensor | None = None
    ) -> None:
        """Take the (B, S) lengths of the segments, and the prefixes as in the attributes (None: there are none)."""
        numbers = torch.arange(len(lengths))
        before = torch.zeros_like(numbers) if prefix_lengths is None else prefix_lengths
        self.prefix_rows = numbers if prefix_rows is None else prefix_rows
        self.lengths = torch.cat([before[:, None], lengths], dim=1)
        self.num_positions = int(self.lengths.sum())
        prompt_ends = before[self.prefix_rows] + lengths[:, 0]
        self.longest_sequence = int((prompt_ends + lengths[:, 1:].amax(1)).max())
        self.table = self._table(prompt_ends)
        self._blocks: dict[int | None, Tensor] = {}
        self._seen_keys: SeenKeys | None = None

    def _table(self, prompt_ends: Tensor) -> Tensor:
        rows, columns = self.lengths.shape
        segments = torch.arange(rows * columns).view(rows, columns)
        prompts, prefixes = segments.clone(), segments.clone()
        prompts[:, 1:] = segments[:, 1:2]
        prefixes[:, 1:] = segments[self.prefix_rows, 0][:, None]
        first_positions = torch.zeros_like(segments)
        first_positions[:, 1] = self.lengths[self.prefix_rows, 0]
        first_positions[:, 2:] = prompt_ends[:, None]
        flat = self.lengths.flatten()
        places = torch.arange(self.num_positions)
        of_position = segments.flatten().repeat_interleave(flat)
        position = places + (first_positions.flatten() - (flat.cumsum(0) - flat))[of_position]
        table = torch.stack(
            [of_position, prompts.flatten()[of_position], prefixes.flatten()[of_position], position]
        ).int()
        width = max(BLOCK, -(-self.num_positions // 64) * 64)
        return F.pad(table, (0, width - self.num_positions))

    def seen_keys(self) -> SeenKeys:
        """Return the micro-batch as sequences of queries and keys; computed once."""
        if self._seen_keys is None:
            self._seen_keys = self._make_seen_keys()
        return self._seen_keys

    def _make_seen_keys(self) -> SeenKeys:
        flat = self.lengths.flatten()
        starts = (flat.cumsum(0) - flat).view_as(self.lengths)
        # The keys of a sequence are three runs of places: prefix, prompt, and the sequence itself. The sequences of a
        # row are its prefix, its prompt with the first response, and the other responses: (B, S, 3).
        run_starts = torch.stack(
            [starts[self.prefix_rows, :1].expand_as(starts), starts[:, 1:2].expand_as(starts), starts], dim=2
        )
        run_lengths = torch.stack(
            [self.lengths[self.prefix_rows, :1].expand_as(starts), self.lengths[:, 1:2].expand_as(starts),
             self.lengths], dim=2,
        ).clone()  # fmt: skip
        run_lengths[:, 0, :2] = 0  # a prefix or prompt must not be its own context as well
        run_lengths[:, 1, 1] = 0
        run_lengths[:, 1, 2] += self.lengths[:, 2]
        sequences = [0, 1, *range(3, self.lengths.shape[1])]
        run_starts, run_lengths = (runs[:, sequences].flatten(0, 1) for runs in (run_starts, run_lengths))
        has_queries = run_lengths[:, 2] > 0
        run_starts, run_lengths = run_starts[has_queries], run_lengths[has_queries]
        num_queries, num_keys = run_lengths[:, 2], run_lengths.sum(1)
        query_starts, key_starts = (F.pad(counts.cumsum(0), (1, 0)).int() for counts in (num_queries, num_keys))
        longest = (int(num_queries.max()), int(num_keys.max()))
        if torch.equal(num_queries, num_keys):
            return SeenKeys(query_starts, key_starts, longest)
        lengths = run_lengths.flatten()
        first = run_starts.flatten() - (lengths.cumsum(0) - lengths)
        places = torch.arange(int(lengths.sum())) + first.repeat_interleave(lengths)
        return SeenKeys(
            query_starts, key_starts, longest, places.int(), places.argsort(stable=True).int(),
            places.bincount(minlength=self.num_positions).int(),
        )  # fmt: skip

    def blocks(self, window: int | None) -> Tensor:
        """Return which blocks of the scores are computed, in the format of flex_attention; computed once per window.

        Args:
            window: positions that a token sees, including itself; None: all before it.

        Returns:
            (4, n, n + 1) int32 for n blocks. Each row is a block of queries: the number of its key blocks, then their
            indices. The four tables are for partly visible blocks, for fully visible ones, and both again with queries
            and keys exchanged. n is at least 2, because a compiler specialises on a size of 1.
        """
        if window is not None and window >= self.longest_sequence:
            window = None
        if window not in self._blocks:
            counts = self._visible_pairs(window)
            partial, full = (counts > 0) & (counts < BLOCK**2), counts == BLOCK**2
            dense = torch.stack([partial, full, partial.T, full.T]).int()
            order = dense.argsort(dim=2, descending=True, stable=True)
            self._blocks[window] = torch.cat([dense.sum(2, keepdim=True), order], dim=2).int()
        return self._blocks[window]

    def _visible_pairs(self, window: int | None) -> Tensor:
        """Count the visible (query, key) pairs in each block: (n, n) int64.

        Segments are cut at the edges of blocks. Take a piece of m queries from position p and a piece of n keys from r:
        a key is visible if its segment is and 0 <= (p + i) - (r + j) < window. The number of such pairs has a closed
        form, so that no T x T mask is needed.
        """
        edges = torch.cat([self.lengths.flatten().cumsum(0), torch.arange(0, self.num_positions, BLOCK)])
        edges = edges.unique()
        starts, sizes = edges[:-1], edges.diff()
        segment, prompt, prefix, position = (row[starts].long() for row in self.table)
        key = segment[None, :]
        related = (key == segment[:, None]) | (key == prompt[:, None]) | (key == prefix[:, None])
        behind = position - position[:, None]  # r - p
        pairs = _pairs_apart(sizes[:, None], sizes, behind)
        if window is not None:
            pairs = pairs - _pairs_apart(sizes[:, None], sizes, behind + window)
        block = starts // BLOCK
        num_blocks = max(2, -(-self.num_positions // BLOCK))
        counts = torch.zeros(num_blocks, num_blocks, dtype=torch.int64)
        return counts.index_put_((block[:, None], block[None, :]), pairs * related, accumulate=True)


def _pairs_apart(num_queries: Tensor, num_keys: Tensor, least: Tensor) -> Tensor:
    """Count the pairs (i, j), i < num_queries and j < num_keys, with i - j >= least."""

    def triangle(x: Tensor) -> Tensor:
        x = x.clamp(min=0)
        return x * (x + 1) // 2

    # sum over i of clamp(i - least + 1, 0, num_keys)
    up_to_all = triangle(num_queries - least) - triangle(-least)
    return up_to_all - (triangle(num_queries - least - num_keys) - triangle(-least - num_keys))


def visible(table: tuple[Tensor, ...], query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Return whether the place `query` sees the place `key`; both are index tensors that broadcast.

    Args:
        table: the rows of `PackedLayout.table`.
        query: places in the micro-batch, from 0 to T - 1.
        key: likewise.
        window: as for `PackedLayout.blocks`.
    """
    segment, prompt, prefix, position = table
    of_key = segment[key]
    related = (of_key == segment[query]) | (of_key == prompt[query]) | (of_key == prefix[query])
    # Everything that a position sees is stored before it, so comparing places is comparing positions.
    seen = related & (key <= query)
    return seen if window is None else seen & (position[query] - position[key] < window)
