"""Stopping on request: after SIGTERM, SIGUSR1 or Ctrl-C a run saves a checkpoint at its next step boundary and ends.

Slurm sends SIGTERM before it preempts a job, and the signal of `sbatch --signal` before the time limit. Signals after
the first count as the same request while the run is saving: Slurm and torchrun repeat signals, and kill a process that
takes too long. Only a second Ctrl-C, more than a second later, exits at once.

This file imports only the standard library, so that `train.py` can handle signals while torch is still loading.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PREEMPTED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later. scripts/slurm/step.sh requeues on it
SAME_REQUEST_SECONDS = 1.0


class Preempted(Exception):
    """The run was asked to stop, and its state is saved."""


def exit_on_signals(
    numbers: Collection[signal.Signals] = SIGNALS, said: str = "before the run had started; rerun the same command"
) -> None:
    """On a signal, exit at once with the status that requests a rerun; use it while there is nothing to save."""

    def leave(number: int, frame: FrameType | None) -> None:
        _say(f"{signal.Signals(number).name} {said}")
        os._exit(PREEMPTED_STATUS)

    for number in _heard_signals():
        if number in numbers:
            signal.signal(number, leave)
    atexit.register(_ignore_signals)  # Python's handlers do not run during its shutdown, and the work is done


def exit_behind_ledgers() -> None:
    """Exit at once on SIGTERM and SIGUSR1, in a program that saves every result as it is made (in a ledger)."""
    exit_on_signals(SIGNALS[:2], "ends it; rerun the same command to continue after the last row")


def _heard_signals() -> list[signal.Signals]:
    """Return the signals to handle: all but the ignored ones (shells make background jobs, `&`, ignore Ctrl-C)."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


class StopRequest:
    """Whether this process, or the launcher that started it, was asked to stop."""

    def __init__(self, asked_elsewhere: Callable[[], bool] = lambda: False) -> None:
        """Start without a request; `asked_elsewhere` (other processes) must be cheap, as every step calls it."""
        self._asked_elsewhere = asked_elsewhere
        self._asked_at: float | None = None
        self._closed = False

    def __bool__(self) -> bool:
        """Whether a stop was requested."""
        return self._asked_at is not None or self._asked_elsewhere()

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Record a request (a signal handler); a second Ctrl-C ends the process with status 128 + signal."""
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            if number == signal.SIGINT:
                _say("stopping after this step, with a checkpoint; Ctrl-C again ends at once")
        elif number == signal.SIGINT and now - self._asked_at > SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    def close(self) -> None:
        """Ignore signals from now on: everything is saved, and a launcher signals the processes that end last."""
        self._closed = True
        _ignore_signals()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle signals within the context; do nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.ask) for number in _heard_signals()}
        try:
            yield
        finally:
            for number, handler in before.items() if not self._closed else ():
                signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in _heard_signals():
        signal.signal(number, signal.SIG_IGN)


def _say(text: str) -> None:
    os.write(sys.stderr.fileno(), f"{Path(sys.argv[0]).name}: {text}\n".encode())
