"""The global batches of a run and their order; `trainers.data.cutters` cuts them into micro-batches.

Letters: N rows of a store, B rows of a batch.

Global batch k of epoch e depends only on (seed, e, batch_size), so that 1 process and 16 see the same batches. The
position of a run in the data is one number: the examples seen.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile

import torch
from tensordict import TensorDict
from torch import Tensor

from trainers.data.cutters import Cutter, Part
from trainers.data.token_store import TokenStore, sequence_lengths

CPU = torch.device("cpu")


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one optimizer step, and this rank's share of them.

    A rank without rows (fewer rows than ranks) has no micro-batch. Every forward and backward pass of a sharded model
    is a collective, so a rank with fewer micro-batches than another runs fillers, which do not count.
    """

    microbatches: list[TensorDict]  # this rank's rows; padded ones are sorted longest first; none is empty
    fillers: list[TensorDict]  # micro-batches that are run but do not count
    num_examples: int  # rows of the whole global batch, over all ranks
    rows: Tensor  # (num_examples,) int64 row numbers of the whole global batch, in the order of the epoch
    start_examples: int  # examples seen before this batch

    @property
    def passes(self) -> list[tuple[TensorDict, bool]]:
        """Return (micro-batch, whether it counts) for every pass of this rank."""
        return [*((one, True) for one in self.microbatches), *((one, False) for one in self.fillers)]


def permutation(num_rows: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order of the rows in an epoch, (N,) int64; it depends on the arguments only, not on earlier epochs."""
    digest = hashlib.blake2b(f"order of seed {seed}, epoch {epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randperm(num_rows, generator=generator)


class BatchLoader:
    """Global batches of a store, in an order that depends only on the seed and the epoch.

    A batch never crosses epochs; the last one of an epoch may be smaller. A store smaller than `batch_size` gives one
    batch per epoch.

    Args:
        store: The tokenised rows.
        cutter: Cuts a global batch into micro-batches.
        batch_size: Rows of a global batch, over all ranks.
        seed: Determines the order, together with the epoch. None: the order of the store, in every epoch.
        num_epochs: Stop after this many passes over the store.
        num_examples: Stop after this many rows. At least one of the two limits is needed; the first one reached counts.
        rank: This process, from 0.
        world_size: Number of processes.
        device: Where the micro-batches will be used. They are made on the host, in pinned memory if this is a GPU, so
            that they can be copied asynchronously.

    Attributes:
        store, cutter: As given.
        columns: Per-row values (N, ...) by name, from the store or added before `batches` is called. A micro-batch gets
            the values of its rows.
        total_examples: Rows of the whole run, repeats included.
        steps: Global batches of the whole run.
    """

    def __init__(
        self, store: TokenStore, cutter: Cutter, *, batch_size: int, seed: int | None = None,
        num_epochs: int | None = 1, num_examples: int | None = None, rank: int = 0, world_size: int = 1,
        device: torch.device = CPU,
    ) -> None:  # fmt: skip
        if num_epochs is None and num_examples is None:
            raise ValueError("one of num_epochs and num_examples must be given, or the loader would never end")
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"{batch_size=} must be positive, and 0 <= {rank=} < {world_size=}")
        self.store, self.cutter = store, cutter
        self.columns: dict[str, Tensor] = dict(store.columns)
        self._shortest: Tensor | None = None  # a filler's row, (1,)
        self._batch_size, self._seed = batch_size, seed
        self._rank, self._world_size, self._device = rank, world_size, device
        limits = [num_examples, None if num_epochs is None else num_epochs * len(store)]
        self.total_examples = min(limit for limit in limits if limit is not None) if len(store) else 0
        epochs, rest = divmod(self.total_examples, len(store)) if len(store) else (0, 0)
        self.steps = epochs * -(-len(store) // batch_size) + -(-rest // batch_size)

    def rows_visited(self) -> Tensor:
        """Return the sorted row numbers that the run visits, int64."""
        return self._order(0)[: self.total_examples].sort().values

    def rows_of_batches(self, start: int, stop: int) -> Tensor:
        """Return the sorted unique row numbers (int64) of the batches that begin at start to stop - 1 examples seen."""
        rows = [rows for _, rows in takewhile(lambda batch: batch[0] < stop, self._plan(start))]
        return torch.cat(rows).unique() if rows else torch.empty(0, dtype=torch.int64)

    def batches(self, start_examples: int = 0) -> Iterator[GlobalBatch]:
        """Yield the batches of the run from a position on; a thread makes the next one while the current one is used.

        Exceptions of the thread are raised here.

        Args:
            start_examples: Examples seen so far. At the end of a batch, the batches are the same as in an
                uninterrupted run; inside a batch, the rest of that batch comes first.
        """
        # A new thread starts on GPU 0, whatever this rank's GPU is, and pinning memory would open a CUDA context there.
        choose_gpu = partial(torch.cuda.set_device, self._device) if self._device.type == "cuda" else None
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch", initializer=choose_gpu) as thread:
            coming = None
            for start, rows in self._plan(start_examples):
                following = thread.submit(self._make, start, rows)
                if coming is not None:
                    yield coming.result()
                coming = following
            if coming is not None:
                yield coming.result()

    def plan(self) -> Iterator[tuple[Tensor, list[list[int]]]]:
        """Yield the sizes of the batches without making them, from the lengths and first tokens of the rows alone.

        Yields:
            for each global batch, its rows (int64), and the number of positions of each micro-batch of each rank.
        """
        for _, rows in self._plan(0):
            shares = self.cutter.cut(self.store, rows, self._world_size)
            yield rows, [[part.positions for part in share] for share in shares]

    def excerpt(self, rows: Tensor, microbatches: int | None = None) -> BatchLoader:
        """Return a loader of a single global batch of these rows (B,), over a store of no other rows.

        If a rank has more than `microbatches` micro-batches, keep only the rows of its largest ones.
        """
        one = copy.copy(self)
        shares = self.cutter.cut(self.store, rows, self._world_size)
        if microbatches is not None and max(map(len, shares)) > microbatches:
            largest = [sorted(share, key=lambda part: -part.positions)[:microbatches] for share in shares]
            rows = torch.cat([rows[part.places] for share in largest for part in share])
            one.cutter = replace(self.cutter, num_microbatches=min(self.cutter.num_microbatches, microbatches))
        one.store = self.store.select(rows)
        one.columns = dict(one.store.columns)
        one.total_examples = one._batch_size = len(rows)
        one._seed, one.steps, one._shortest = None, 1, None
        return one

    def filler(self) -> TensorDict:
        """Make a micro-batch of the shortest row that the run visits."""
        if self._shortest is None:  # half a second in a million rows
            rows = self.rows_visited()  # only these have reference log-probabilities
            self._shortest = rows[sequence_lengths(self.store.lengths[rows]).argmin()].view(1)
        return self._collate(self.cutter.cut(self.store, self._shortest, 1)[0][0])

    def previous(self, examples: int) -> int:
        """Return the examples seen before the batch that ended at `examples`."""
        epoch, offset = divmod(examples - 1, len(self.store))
        return epoch * len(self.store) + offset - offset % self._batch_size

    def _order(self, epoch: int) -> Tensor:
        if self._seed is None:
            return torch.arange(len(self.store))
        return permutation(len(self.store), seed=self._seed, epoch=epoch)

    def _plan(self, start: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (examples seen before, row numbers) of each global batch."""
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
        # Cutting depends on the rows only, so each rank knows the others' shares without communication.
        shares = self.cutter.cut(self.store, rows, self._world_size)
        own = shares[self._rank]
        num_idle = max(map(len, shares)) - len(own)
        return GlobalBatch(
            [self._collate(part) for part in own],
            [self.filler()] * num_idle if num_idle else [],
            num_examples=len(rows),
            rows=rows,
            start_examples=start,
        )

    def _collate(self, part: Part) -> TensorDict:
        batch = self.cutter.collate(self.store, part, self.columns)
        return batch.pin_memory() if self._device.type == "cuda" else batch


def passes_multiple(before: int, after: int, every: int) -> bool:
    """Return whether the examples seen passed a multiple of `every` on the way from `before` to `after`."""
    return after // every > before // every
