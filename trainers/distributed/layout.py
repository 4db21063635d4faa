"""The place of a process in its run, and how the processes talk."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

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
        """The result of rank 0's call (picklable), in every process; each process must come here.

        Raises:
            UserError: rank 0's, there; `SaidElsewhere` in the other processes, also where rank 0 failed otherwise.
        """
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
        self.store.set(key, pickle.dumps((True, result)).hex())
        return result

    def main_first(self, function: Callable[[], T]) -> T:
        """Every process's own result, the others' after rank 0's: what it leaves in a cache is found there."""
        results: list[T] = []
        self.on_main(lambda: results.append(function()))
        return results[0] if self.is_main else function()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of every process's `values` (any shape), in place."""
    dist.all_reduce(values)
    return values


def gather_from_processes(values: Tensor) -> Tensor:
    """Every process's `values`, of one shape in all of them: (world size, ...)."""
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)


def gather_objects(value: T) -> list[T]:
    """Every process's value (picklable), by rank, in all of them."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def stop_requested(layout: Layout) -> bool:
    """Whether any process was asked to stop: the same answer in all of them."""
    return bool(sum_over_processes(torch.tensor(int(bool(layout.stop)))).item())
