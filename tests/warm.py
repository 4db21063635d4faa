"""Processes that start warm: commands of the entrypoints, forked from a process that has made the slow imports.

A test that types fifty commands would otherwise spend most of its time importing torch and transformers. The process
that is forked has run no code of a test, so nothing that a test patches reaches a command. A few tests keep to a real
`python train.py` (tests/test_bad_input.py, tests/test_launch.py): what users type starts cold.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

IMPORTS = [
    "torch", "transformers.models.llama.modeling_llama", "transformers.generation.utils", "torch.distributed.fsdp",
    "torch.distributed.checkpoint", "torch._dynamo", "hydra", "datasets", "tensordict", "wandb", "openai",
    "scipy.stats", "statsmodels.stats.multitest", "matplotlib.figure", "datasketch", "duckdb", "lm_eval",
]  # fmt: skip


def _run(
    arguments: Sequence[str], folder: str, environment: Mapping[str, str], out: int, err: int, session: bool
) -> None:
    """Become `python ARGUMENTS` in a folder and an environment."""
    if session:
        os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1 if number == 2 else -1, closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.orig_argv = list(arguments), [sys.executable, *arguments]
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    status = 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    raise SystemExit(status)


class WarmProcess:
    """What a test needs of `subprocess.Popen(text=True)`."""

    def __init__(self, process: Any, out: Path, err: Path) -> None:
        """`out`, `err`: files that its output goes to."""
        self._process, self._out, self._err = process, out, err
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status once the end was seen, minus the signal that killed it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit status; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._out), timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return what it printed."""
        self.wait(timeout)
        return self._out.read_text(errors="replace"), self._err.read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.warm_imports"])


def start(
    arguments: Sequence[str], *, cwd: Path | str = ".", env: Mapping[str, str] | None = None, session: bool = False
) -> WarmProcess:
    """Start `python ARGUMENTS` in a folder; the first argument is the path of a program."""
    import tempfile

    files = [tempfile.NamedTemporaryFile(prefix="warm-", suffix=suffix, delete=False) for suffix in (".out", ".err")]  # noqa: SIM115
    process = _context.Process(
        target=_start, args=(list(arguments), str(cwd), dict(os.environ if env is None else env),
                             files[0].name, files[1].name, session), daemon=False,
    )  # fmt: skip
    process.start()
    return WarmProcess(process, *(Path(file.name) for file in files))


def _start(arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str, session: bool) -> None:
    descriptors = [os.open(name, os.O_WRONLY | os.O_TRUNC) for name in (out, err)]
    _run(arguments, folder, environment, *descriptors, session)
