"""One line on the terminal that tells how far a run is."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm


@contextmanager
def saying(what: str, *, active: bool, seconds: float = 30.0, always: bool = False) -> Iterator[None]:
    """Print now and then what takes so long and for how long it has; `always`: on a terminal, too, which shows bars."""
    stream, started, done = sys.stderr, time.monotonic(), threading.Event()

    def repeat() -> None:
        while not done.wait(seconds):
            print(f"{what}: {tqdm.format_interval(time.monotonic() - started)} so far", file=stream, flush=True)

    if active and (always or not stream.isatty()):
        threading.Thread(target=repeat, daemon=True).start()
    try:
        yield
    finally:
        done.set()


class ProgressLine:
    """One line with the examples seen, the time that is left and a few numbers; a line now and then off a terminal."""

    SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, total: int, done: int, stream: TextIO | None = None, *, active: bool = True) -> None:
        """`total` and `done` are examples; one that is not active says nothing. `stream` is stderr by default."""
        stream = stream or sys.stderr  # now: what stderr is may have changed since the import
        self._active = active
        self._bar = tqdm(
            total=total, initial=done, unit="ex", file=stream, disable=not (active and stream.isatty()), leave=True
        )
        self._stream = stream
        self._total, self._first, self._done = total, done, done
        self._started = time.monotonic()
        self._last_line = self._started - self.SECONDS_BETWEEN_LINES + 5
        self._note = ""

    def update(self, done: int, note: str | None = None) -> None:
        """Move on to `done` examples; `note` replaces the earlier one."""
        self._note = self._note if note is None else note
        if not self._bar.disable:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        if self._bar.disable and time.monotonic() - self._last_line >= self.SECONDS_BETWEEN_LINES:
            self._write_line()

    def _write_line(self) -> None:
        if not self._active:
            return
        self._last_line = time.monotonic()
        seconds = self._last_line - self._started
        rate = (self._done - self._first) / seconds if seconds else 0.0
        left = tqdm.format_interval((self._total - self._done) / rate) if rate else "?"
        line = f"{self._done}/{self._total} examples, {rate:.1f}/s, {left} left"
        print(f"{line}, {self._note}" if self._note else line, file=self._stream, flush=True)

    def close(self) -> None:
        """Write the last line."""
        if self._bar.disable:
            self._write_line()
        self._bar.close()
