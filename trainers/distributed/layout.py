"""The place of a process in its run, and communication between the processes."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from config.errors import SaidElsewhere
from trainers.distributed.preemption import StopRequest

T = TypeVar("T")

WAIT = timedelta(days=2)  # time for rank 0 to tokenise a corpus; if a rank dies, the launcher ends the others


@dataclass(frozen=True)
class Layout:
    """This process's place in the run."""

    rank: int
    world_size: int
    device: torch.device
    stop: StopRequest = field(default_factory=StopRequest)
    mesh: DeviceMesh | None = None  # the model is sharded over it; None: a single process, not sharded
    store: dist.Store = field(default_factory=dist.HashStore)  # small messages between the processes, in order
    _calls: Iterator[int] = field(default_factory=itertools.count)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` in rank 0 and return its result (picklable) in every process. Every process must call this.

        Raises:
            SaidElsewhere: in the other processes, if rank 0 failed; rank 0 raises its own error.
        """
        return cast(T, self._call_on_main(function, share=True))

    def main_only(self, function: Callable[[], T]) -> T | None:
        """Call `function` in rank 0 and return its result there; the others wait and return None. See `on_main`.

        For results that cannot be pickled or are too large to send, such as a model.
        """
        return self._call_on_main(function, share=False)

    def main_first(self, function: Callable[[], T]) -> T:
        """Call `function` in rank 0 and then in the others, which find in the cache what rank 0 has put there."""
        result = self.main_only(function)
        return cast(T, result) if self.is_main else function()

    def _call_on_main(self, function: Callable[[], T], *, share: bool) -> T | None:
        key = f"on_main/{next(self._calls)}"
        if not self.is_main:
            self.store.wait([key], WAIT)
            ok, value = pickle.loads(bytes.fromhex(self.store.get(key).decode()))
            if not ok:
                raise SaidElsewhere(value)
            return value
        try:
            result = function()
        except BaseException as error:
            self.store.set(key, pickle.dumps((False, str(error))).hex())
            raise
        self.store.set(key, pickle.dumps((True, result if share else None)).hex())
        return result


# The collectives below do nothing in a single process: on a GPU even a collective of one process launches kernels and
# waits. No other code depends on the number of processes.


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of `values` (any shape) over all processes, computed in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(value: T) -> list[T]:
    """Return the (picklable) values of all processes, ordered by rank, in every process."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share_from_main(values: Tensor) -> None:
    """Overwrite `values` (contiguous, same shape and dtype everywhere) with those of rank 0 in every process."""
    if dist.get_world_size() > 1:
        dist.broadcast(values.view(-1).view(torch.uint8), src=0)  # as bytes: gloo has no booleans
