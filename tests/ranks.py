"""Several processes of a run on this machine, over gloo, for tests.

They come from the fork server of `tests/warm.py`: starting four costs a second, not twenty.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from config.settings import TrainConfig
from tests.warm import fork_server
from trainers.distributed.launch import work_in_group
from trainers.distributed.layout import Layout
from trainers.distributed.preemption import PREEMPTED_STATUS, Preempted, StopRequest
from trainers.distributed.spawn import Place


class Ranks:
    """Started processes; each runs `work(layout, *arguments)`, a function of a module, in one process group."""

    def __init__(self, work: Callable[..., None], world_size: int, settings: TrainConfig, *arguments: Any) -> None:
        context = fork_server()
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        worker = partial(_call, work=work, arguments=arguments)
        self.processes = [
            context.Process(target=_rank, args=(Place(rank, world_size, rank), self.store.port, worker, settings))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def join(self, timeout: float = 1500) -> list[int | None]:
        """Waits for all; their exit statuses, by rank. Where one has died, the others are ended, as launchers do."""
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
                wait([process.sentinel for process in self.processes if process.is_alive()], timeout=1.0)
                if any(process.exitcode not in (None, 0, PREEMPTED_STATUS) for process in self.processes):
                    deadline = min(deadline, time.monotonic() + 60)  # one that waits for the dead may wait for long
        finally:  # a test that takes too long is ended here
            for process in self.processes:
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]


def run_ranks(work: Callable[..., None], world_size: int, settings: TrainConfig, *arguments: Any) -> None:
    """Runs `work` in all processes to the end, which must be a good one."""
    statuses = Ranks(work, world_size, settings, *arguments).join()
    assert statuses == [0] * world_size, statuses


def _call(layout: Layout, *, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    work(layout, *arguments)


def _rank(place: Place, port: int, worker: Callable[[Layout], None], settings: TrainConfig) -> None:
    torch.set_num_threads(1)
    try:
        work_in_group(place, StopRequest(), worker=worker, settings=settings, address=port)
    except Preempted:
        raise SystemExit(PREEMPTED_STATUS) from None
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def read(folder: Path, name: str) -> Any:
    """What a rank left with `torch.save`."""
    return torch.load(folder / name, weights_only=True)
