"""What `safer_instruct/engine_ray.py` asks of ray, on forks of the warm server: tasks, and what dies begins again."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from config.errors import UserError
from tests.warm import fork_server


class Task:
    """One call in a process of its own, until it has returned."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = partial(function, *arguments)
        self.result = Path(tempfile.mkdtemp()) / "result"
        self.deaths = 0
        self.begin()

    def begin(self) -> None:
        arguments = (self.call, dict(os.environ), str(self.result))
        self.process = fork_server().Process(target=_call, args=arguments)
        self.process.start()

    def is_done(self, retries: int) -> bool:
        if not self.process.is_alive() and not self.result.exists() and self.deaths < retries:
            self.deaths += 1
            self.begin()
        return not self.process.is_alive()


class Crashed(Exception):
    """A worker died as often as it may."""


class StandIn:
    """The module: `sys.modules["ray"]`."""

    exceptions = SimpleNamespace(WorkerCrashedError=Crashed, OutOfMemoryError=Crashed)
    retries = 0

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def is_initialized(self) -> bool:
        return True

    def remote(self, **options: Any) -> Callable[[Callable[..., Any]], SimpleNamespace]:
        assert options["max_calls"] == 1
        self.retries = options["max_retries"]
        return lambda function: SimpleNamespace(remote=partial(self._begin, function))

    def _begin(self, function: Callable[..., Any], *arguments: Any) -> Task:
        self.tasks.append(Task(function, *arguments))
        return self.tasks[-1]

    def wait(self, tasks: Sequence[Task], *, num_returns: int, timeout: float) -> tuple[list[Task], list[Task]]:
        until = time.monotonic() + timeout
        while time.monotonic() < until and sum(task.is_done(self.retries) for task in tasks) < num_returns:
            time.sleep(0.05)
        done = [task for task in tasks if task.is_done(self.retries)]
        return done, [task for task in tasks if task not in done]

    def get(self, task: Task) -> Any:
        if not task.result.exists():
            raise Crashed("the worker died")
        return pickle.loads(task.result.read_bytes())

    def workers(self) -> list[int]:
        """The processes that are at a task."""
        return [task.process.pid or 0 for task in self.tasks if task.process.is_alive()]


def _call(call: Callable[[], Any], environment: dict[str, str], result: str) -> None:
    os.environ.update(environment)
    partial_result = Path(result).with_suffix(".partial")
    partial_result.write_bytes(pickle.dumps(call()))
    partial_result.rename(result)


def die(index: int) -> None:
    """The work of a shard that kills every worker."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail_at_one(folder: Path, index: int) -> None:
    """The work of a shard, of which the second has something that the user must mend."""
    if index == 1:
        raise UserError("no such row")
    (folder / str(index)).write_text("done")
