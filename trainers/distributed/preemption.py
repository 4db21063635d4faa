"""Stopping on request: SIGTERM, SIGUSR1 or Ctrl-C ends a run at its next step boundary, with a checkpoint.

Slurm sends SIGTERM before it takes a job's nodes away, and whatever `sbatch --signal` names before the time is up. The
first signal asks, and the others that come while all is being saved are the same request: Slurm and torchrun repeat
it, and kill what takes too long. Only a second Ctrl-C, more than a second later, exits at once.

Nothing but the standard library is imported here, so that `train.py` can answer while torch is still loading.
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
    """The run was asked to stop, and all that it has is saved."""


def exit_on_signals(
    numbers: Collection[signal.Signals] = SIGNALS, said: str = "before the run had begun; the same command begins it"
) -> None:
    """Exit on a signal with the status that asks for another try: there is nothing (more) to save."""

    def leave(number: int, frame: FrameType | None) -> None:
        _say(f"{signal.Signals(number).name} {said}")
        os._exit(PREEMPTED_STATUS)

    for number in _heard_signals():
        if number in numbers:
            signal.signal(number, leave)
    atexit.register(_ignore_signals)  # what is done is done: the interpreter's last steps know no handlers


def exit_behind_ledgers() -> None:
    """Exit on SIGTERM and SIGUSR1 with that status, in a program whose results are durable one by one."""
    exit_on_signals(SIGNALS[:2], "ends it; the same command goes on behind the last row")


def _heard_signals() -> list[signal.Signals]:
    """Return the signals to answer: those that are not ignored, as shells have it for Ctrl-C and jobs behind `&`."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


class StopRequest:
    """Whether this process, or the launcher that started it, was asked to stop."""

    def __init__(self, asked_elsewhere: Callable[[], bool] = lambda: False) -> None:
        """Begin with nothing asked; what tells whether other processes were is cheap: it is called at every step."""
        self._asked_elsewhere = asked_elsewhere
        self._asked_at: float | None = None
        self._closed = False

    def __bool__(self) -> bool:
        """Whether a request has come."""
        return self._asked_at is not None or self._asked_elsewhere()

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Note a request, as a signal handler; a second Ctrl-C ends the process (128 + signal, as shells have it)."""
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            if number == signal.SIGINT:
                _say("stopping after this step, with a checkpoint; Ctrl-C again ends at once")
        elif number == signal.SIGINT and now - self._asked_at > SAME_REQUEST_SECONDS:
            os._exit(128 + number)

    def close(self) -> None:
        """Ignore all further signals, for good: all is saved, and a launcher signals those that end last."""
        self._closed = True
        _ignore_signals()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Answer signals for the time of the context; in the main thread, the only one that may."""
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
