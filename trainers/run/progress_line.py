"""One line on the terminal that shows the progress of a run."""

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
    """Print every `seconds` what is running and for how long; on a terminal (it has bars) only if `always`."""
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
    """A line with examples seen, time left and a few metrics; without a terminal, a new line every 30 seconds."""

    SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, total: int, done: int, stream: TextIO | None = None, *, active: bool = True) -> None:
        """`total` and `done` count examples; an inactive line prints nothing. `stream` is stderr by default."""
        stream = stream or sys.stderr  # looked up here, not as a default: stderr may be replaced after the import
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
        """Set the progress to `done` examples; a `note` replaces the previous one."""
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
