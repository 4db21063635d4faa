"""The place of a process in its run, and how the processes talk."""

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

WAIT = timedelta(days=2)  # for rank 0 to tokenise a corpus; a rank that dies ends the others long before


@dataclass(frozen=True)
class Layout:
    """This process's place in the run."""

    rank: int
    world_size: int
    device: torch.device
    stop: StopRequest = field(default_factory=StopRequest)
    mesh: DeviceMesh | None = None  # the model is sharded over it; None: whole in its one process
    store: dist.Store = field(default_factory=dist.HashStore)  # small messages between the processes, in order
    _calls: Iterator[int] = field(default_factory=itertools.count)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def on_main(self, function: Callable[[], T]) -> T:
        """Return the result of rank 0's call (picklable) in every process; each process must come here.

        Raises:
            UserError: rank 0's, there; `SaidElsewhere` in the other processes, also where rank 0 failed otherwise.
        """
        return cast(T, self._call_on_main(function, share=True))

    def main_only(self, function: Callable[[], T]) -> T | None:
        """Return the result of rank 0's call there, and None in the others, which wait for it; errors as in `on_main`.

        For results that are not picklable or too large to send, such as a model.
        """
        return self._call_on_main(function, share=False)

    def main_first(self, function: Callable[[], T]) -> T:
        """Return every process's own result, the others' after rank 0's: what it leaves in a cache is found there."""
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


# A process that is alone has nobody to ask. The collectives below then make no call at all: on a GPU even one of a
# single process launches kernels and waits. This is the only place that knows.


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of every process's `values` (any shape), taken in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(value: T) -> list[T]:
    """Return every process's value (picklable), by rank, in all of them."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share_from_main(values: Tensor) -> None:
    """Overwrite every process's `values` (contiguous, of one shape and dtype in all of them) by rank 0's."""
    if dist.get_world_size() > 1:
        dist.broadcast(values.view(-1).view(torch.uint8), src=0)  # as bytes: gloo has no booleans
