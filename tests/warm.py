"""Python processes that need not import torch: forks of a server that has imported it once, in the shape of subprocess.

`python train.py` spends six seconds of CPU on imports and a tiny run one on its work. `warm.run` and `warm.Popen` take
the words of such a command and do in a fork what the interpreter would do: its working directory, environment, argv and
`__main__`, its streams, its exit status, signals to its pid. What only a fresh interpreter shows (which modules a
command imports, variables that are read at import, a signal during the imports) is for `subprocess` to test.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import chdir
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What the functions that run there need, too: each fork would import it again.
PRELOADED = ["train", "induce", "evaluate", "tests.conftest", "tests.ranks", "tests.tiny_runs"]


@cache
def fork_server() -> ForkServerContext:
    """The context whose processes are forks of the one server of this test session.

    The server has imported, and computed nothing: a fork of a process that has started its OpenMP threads would hang.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with chdir(ROOT):  # where it finds those modules, whatever folder the first test that asks is in
        forkserver.ensure_running()
    return context


class Popen:
    """`subprocess.Popen` of `python FILE ...` or `python -m MODULE ...`; stdout and stderr are always kept, as text."""

    def __init__(
        self, command: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, **streams: Any
    ) -> None:
        assert command[0] == sys.executable
        folder = Path(tempfile.mkdtemp())
        self.outputs = [folder / "stdout", folder / "stderr"]
        for path in self.outputs:
            path.touch()
        arguments = (list(command), str(cwd or Path.cwd()), dict(os.environ if env is None else env), self.outputs)
        self.process = fork_server().Process(target=_run, args=arguments)
        self.process.start()
        self.pid: int = self.process.pid or 0
        weakref.finalize(self, _discard, self.process, folder)

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the signal that ended it; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0.0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8") for path in self.outputs)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[str], *, timeout: float = 1500, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of such a command."""
    started = Popen(command, **options)
    try:
        out, err = started.communicate(timeout)
    finally:
        started.kill()
    done = subprocess.CompletedProcess(command, started.wait(), out, err)
    if check:
        done.check_returncode()
    return done


def _discard(process: ForkServerProcess, folder: Path) -> None:
    """End what a failed test has left running, and remove its streams."""
    if process.is_alive():
        process.kill()
        process.join()
    shutil.rmtree(folder)


def _run(command: list[str], cwd: str, environment: dict[str, str], outputs: list[Path]) -> None:
    """Do, in the fork, what the interpreter does with the words of the command."""
    for descriptor, path in enumerate(outputs, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)  # beneath sys.stderr, which handlers made by the imports hold
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    forks = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: forks  # type: ignore  # what it would spawn imports nothing either
    sys.orig_argv = command
    if command[1] == "-m":
        sys.argv = [command[2], *command[3:]]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command[1:]
        runpy.run_path(command[1], run_name="__main__")
