"""Which rows make up which batch, and the tensors of a micro-batch: packed (`trainers.data.packing`), or padded.

Letters: N rows of a store, B rows of a micro-batch, T padded length, S segments of a row.

Global batch k of epoch e is a function of (seed, e, batch_size) alone: 1 process and 16 see the same batches. The
position of a run is one number, the examples seen.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

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
from trainers.data.token_store import TokenStore


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step's rows, as this rank sees them.

    Attributes:
        microbatches: This rank's rows, padded ones longest first; never an empty one. A rank without rows (a batch
            of fewer rows than ranks) has none.
        num_idle: Micro-batches that some other rank has more than this one. Where the model is sharded, every pass
            is a collective: this rank makes as many passes over `BatchLoader.filler()`, which count nothing.
        num_examples: Rows of the whole global batch, over all ranks.
        rows: (num_examples,) int64 row numbers of the whole global batch, in the order of the epoch.
        start_examples: Examples seen before this batch.
    """

    microbatches: list[TensorDict]
    num_idle: int
    num_examples: int
    rows: Tensor
    start_examples: int


def permutation(num_rows: int, *, seed: int, epoch: int) -> Tensor:
    """Order of the rows in an epoch, (N,) int64: a function of its arguments, not of the epochs before it."""
    digest = hashlib.blake2b(f"order of seed {seed}, epoch {epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(num_rows, generator=generator)


class BatchLoader:
    """Global batches of a store, in an order that only the seed and the epoch decide.

    An epoch's last batch may be smaller: it is kept, and a batch never crosses epochs. A store smaller than
    `batch_size` gives one batch an epoch.

    Args:
        store: The tokenised rows.
        batch_size: Rows of a global batch, over all ranks.
        seed: Decides the order, together with the epoch.
        shuffle: False: the store's own order, the same in every epoch.
        num_epochs: Stop after so many passes over the store.
        num_examples: Stop after so many rows, whichever comes first; at least one of the two is needed.
        num_microbatches: Micro-batches of a rank's share; fewer where it has fewer rows, more where
            `max_tokens_per_microbatch` is exceeded.
        max_tokens_per_microbatch: Token positions (padded: of both responses' sequences for pairs) that no micro-batch
            exceeds, unless a single row does. None: no limit; packed, what suits the kind of device here.
        pad_token_id: Fills the right of shorter rows.
        packing: Micro-batches without padding that hold the prompt of a pair once, see `collate_packed`.
        rank: This process, from 0.
        world_size: Number of processes. Shares of a batch differ by at most one row; packed, by as few positions as
            its rows allow.
        columns: Per-row values (N, ...) that every micro-batch gets a slice of, by name.

    Attributes:
        store, pad_token_id, packing: As given.
        columns: As given; may be set until `batches` is called.
        total_examples: Rows of the whole run, repeats included.
        steps: Global batches of the whole run.
        max_tokens: Positions that no micro-batch exceeds, unless a single row does; None: no limit.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        num_epochs: int | None,
        num_examples: int | None,
        num_microbatches: int,
        max_tokens_per_microbatch: int | None,
        pad_token_id: int,
        packing: bool = False,
        rank: int = 0,
        world_size: int = 1,
        columns: Mapping[str, Tensor] | None = None,
    ) -> None:
        if num_epochs is None and num_examples is None:
            raise ValueError("one of num_epochs and num_examples must be given, or the loader would never end")
        if min(batch_size, num_microbatches) < 1 or not 0 <= rank < world_size:
            raise ValueError(f"{batch_size=}, {num_microbatches=} must be positive, and 0 <= {rank=} < {world_size=}")
        self.store, self.pad_token_id, self.packing = store, pad_token_id, packing
        self.columns: dict[str, Tensor] = dict(columns or {})
        self._batch_size, self._seed, self._shuffle = batch_size, seed, shuffle
        self._num_microbatches, self.max_tokens = num_microbatches, max_tokens_per_microbatch
        if packing and max_tokens_per_microbatch is None:
            self.max_tokens = default_max_tokens(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._rank, self._world_size = rank, world_size
        limits = [num_examples, None if num_epochs is None else num_epochs * len(store)]
        self.total_examples = min(limit for limit in limits if limit is not None) if len(store) else 0
        epochs, rest = divmod(self.total_examples, len(store)) if len(store) else (0, 0)
        self.steps = epochs * -(-len(store) // batch_size) + -(-rest // batch_size)

    def rows_visited(self) -> Tensor:
        """Row numbers that the run visits at least once, ascending, int64."""
        return self._order(0)[: self.total_examples].sort().values

    def batches(self, start_examples: int = 0) -> Iterator[GlobalBatch]:
        """The batches of the run from a position on, each made in a thread while the one before it is in use.

        Args:
            start_examples: Examples seen so far. A run that stopped at the end of a batch goes on with the same
                batches as if it had not; from a position inside of a batch, its rest comes first.

        Yields:
            Global batches; what goes wrong in the thread is raised here.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
            coming = None
            for start, rows in self._plan(start_examples):
                following = thread.submit(self._make, start, rows)
                if coming is not None:
                    yield coming.result()
                coming = following
            if coming is not None:
                yield coming.result()

    def plan(self) -> Iterator[tuple[Tensor, list[list[int]]]]:
        """What `batches` would make, from the lengths and beginnings of the rows.

        Yields:
            of each global batch its rows (int64), and for each rank the positions of each of its micro-batches.
        """
        for _, rows in self._plan(0):
            prefixes = self._prefixes(rows)
            sizes = RowSizes.of(self._row_positions(rows), prefixes)
            yield rows, [[self._positions(sizes, part) for part in own] for own in self._cuts(rows, prefixes)]

    def _row_positions(self, rows: Tensor) -> Tensor:
        """Positions of each of these rows by itself, (B,) int64."""
        if self.packing:
            return input_lengths(self.store.lengths[rows].long()).sum(1)
        return self._sequence_lengths(rows) * (self.store.num_segments - 1)

    def _positions(self, sizes: RowSizes, part: list[int]) -> int:
        """Positions of a micro-batch of these rows."""
        return sizes.positions(part) if self.packing else len(part) * max(sizes.own[i] for i in part)

    def _prefixes(self, rows: Tensor) -> Prefixes:
        """What the rows of a global batch have in common; padded ones share nothing."""
        return shared_prefixes(self.store, rows) if self.packing else no_prefixes(len(rows))

    def excerpt(self, rows: Tensor) -> BatchLoader:
        """A loader of a single global batch, of these rows (B,), cut as in this one; its store has no others."""
        one = copy.copy(self)
        one.store, one.columns = self.store.select(rows), {}
        one.total_examples = one._batch_size = len(rows)
        one._shuffle, one.steps = False, 1
        return one

    def _order(self, epoch: int) -> Tensor:
        if not self._shuffle:
            return torch.arange(len(self.store))
        return permutation(len(self.store), seed=self._seed, epoch=epoch)

    def _plan(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """(examples seen before it, row numbers) of each global batch."""
        while start < self.total_examples:
            epoch, offset = divmod(start, len(self.store))
            base = epoch * len(self.store)
            order = self._order(epoch)[: self.total_examples - base]
            while offset < len(order):
                stop = min(offset - offset % self._batch_size + self._batch_size, len(order))
                yield base + offset, order[offset:stop]
                offset = stop
            start = base + offset

    def _make(self, start: int, rows: Tensor) -> GlobalBatch:
        """This rank's micro-batches. From the batch's rows alone each rank knows how the others cut their shares."""
        prefixes = self._prefixes(rows)
        cuts = self._cuts(rows, prefixes)
        own = [torch.tensor(part) for part in cuts[self._rank]]
        return GlobalBatch(
            [self._collate(rows[part], prefixes.select(part)) for part in own],
            num_idle=max(map(len, cuts)) - len(own),
            num_examples=len(rows),
            rows=rows,
            start_examples=start,
        )

    def _cuts(self, rows: Tensor, prefixes: Prefixes) -> list[list[list[int]]]:
        """For each rank the indices into `rows` of each of its micro-batches."""
        return self._packed_cuts(rows, prefixes) if self.packing else self._padded_cuts(rows)

    def _packed_cuts(self, rows: Tensor, prefixes: Prefixes) -> list[list[list[int]]]:
        """Shares balanced by positions."""
        assert self.max_tokens is not None
        sizes = RowSizes.of(self._row_positions(rows), prefixes)
        cuts = []
        for share in balanced_shares(sizes.own, self._world_size):
            packed = pack_rows(sizes.select(share), limit=self.max_tokens, at_least=self._num_microbatches)
            cuts.append([[share[i] for i in part] for part in packed])
        return cuts

    def _padded_cuts(self, rows: Tensor) -> list[list[list[int]]]:
        """Every world_size-th row by length, so that all ranks have the same work."""
        lengths = self._sequence_lengths(rows)
        by_length = torch.argsort(lengths, descending=True, stable=True)
        cuts: list[list[list[int]]] = []
        for rank in range(self._world_size):
            share = by_length[rank :: self._world_size]
            sizes = self._microbatch_sizes(lengths[share].tolist())
            cuts.append([part.tolist() for part in share.split(sizes)] if sizes else [])
        return cuts

    def filler(self) -> TensorDict:
        """A micro-batch of the shortest row that the run visits, for a pass whose result counts nothing."""
        rows = self.rows_visited()  # others have no reference log-probabilities
        return self._collate(rows[self._sequence_lengths(rows).argmin()].view(1))

    def previous(self, examples: int) -> int:
        """The examples seen before the batch that carried the run to `examples` of them."""
        epoch, offset = divmod(examples - 1, len(self.store))
        return epoch * len(self.store) + offset - offset % self._batch_size

    def _sequence_lengths(self, rows: Tensor) -> Tensor:
        """Length of each row's (longer) sequence, prompt included."""
        lengths = self.store.lengths[rows].long()
        return lengths[:, 0] + lengths[:, 1:].amax(1)

    def _microbatch_sizes(self, lengths: list[int]) -> list[int]:
        """Rows of each micro-batch: equal parts (to one row) of the descending lengths, then the token limit."""
        parts = min(self._num_microbatches, len(lengths))
        sizes: list[int] = []
        row = 0
        for part in range(parts):
            left = len(lengths) // parts + (part < len(lengths) % parts)
            while left:
                size = min(left, self._rows_that_fit(lengths[row]))
                sizes.append(size)
                row, left = row + size, left - size
        return sizes

    def _rows_that_fit(self, length: int) -> int:
        """How many rows, none longer than `length`, one micro-batch may hold."""
        if self.max_tokens is None:
            return self._batch_size
        return max(1, self.max_tokens // (length * (self.store.num_segments - 1)))

    def _collate(self, rows: Tensor, prefixes: Prefixes | None = None) -> TensorDict:
        """The tensors of B rows, in memory that a GPU copies from by itself where there is one."""
        packed = self.packing
        batch = collate_packed(self.store, rows, self.columns, prefixes) if packed else self._collate_padded(rows)
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def _collate_padded(self, rows: Tensor) -> TensorDict:
        """Right-padded: (B, T) for one response a row, (B, 2, T) for chosen and rejected."""
        responses = self.store.num_segments - 1
        shape = (len(rows), responses, int(self._sequence_lengths(rows).max()))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.bool)
        response_mask = torch.zeros(shape, dtype=torch.bool)
        for b, row in enumerate(rows.tolist()):
            prompt, *texts = self.store.row(row)
            start = len(prompt)
            for s, text in enumerate(texts):
                stop = start + len(text)
                input_ids[b, s, :start] = prompt
                input_ids[b, s, start:stop] = text
                attention_mask[b, s, :stop] = True
                response_mask[b, s, start:stop] = True
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}
        if responses == 1:
            batch = {name: tensor.squeeze(1) for name, tensor in batch.items()}
        batch |= {name: column[rows] for name, column in self.columns.items()}
        return TensorDict({**batch, "row": rows}, batch_size=[len(rows)])
