"""Stopping on request: SIGTERM, SIGUSR1 or Ctrl-C ends a run at its next step boundary, with a checkpoint.

Slurm sends SIGTERM before it takes a job's nodes away, and whatever `sbatch --signal` names before the time is up. The
first signal asks; a second one, more than a second later, exits at once. (Less than that apart, they are one request
that came twice: Slurm and torchrun both deliver it to every process.)

Nothing but the standard library is imported here, so that `train.py` can answer while torch is still loading.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PREEMPTED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later. scripts/slurm/train.sbatch requeues on it
SAME_REQUEST_SECONDS = 1.0


class Preempted(Exception):
    """The run was asked to stop, and all that it has is saved."""


def exit_on_signals() -> None:
    """Exit on a signal with the status that asks for another try: until a run begins there is nothing to save."""

    def leave(number: int, frame: FrameType | None) -> None:
        _say(f"{signal.Signals(number).name} before the run had begun; the same command begins it")
        os._exit(PREEMPTED_STATUS)

    for number in _heard_signals():
        signal.signal(number, leave)


def _heard_signals() -> list[signal.Signals]:
    """Return the signals to answer: those that are not ignored, as shells have it for Ctrl-C and jobs behind `&`."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


class StopRequest:
    """Whether this process, or the launcher that started it, was asked to stop."""

    def __init__(self, asked_elsewhere: Callable[[], bool] = lambda: False) -> None:
        """Begin with nothing asked.

        Args:
            asked_elsewhere: tells whether other processes were asked; cheap, because it is called at every step.
        """
        self._asked_elsewhere = asked_elsewhere
        self._asked_at: float | None = None

    def __bool__(self) -> bool:
        """Whether a request has come."""
        return self._asked_at is not None or self._asked_elsewhere()

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Note a request, as a signal handler; the second one ends the process (128 + signal, as shells have it)."""
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            if number == signal.SIGINT:
                _say("stopping after this step, with a checkpoint; Ctrl-C again ends at once")
        elif now - self._asked_at > SAME_REQUEST_SECONDS:
            os._exit(128 + number)

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
            for number, handler in before.items():
                signal.signal(number, handler)


def _say(text: str) -> None:
    os.write(sys.stderr.fileno(), f"train.py: {text}\n".encode())
