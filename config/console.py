"""Make terminal output safe: no escape sequences from files or servers, and no exceptions from failed writes."""

from __future__ import annotations

import io
import sys
import unicodedata
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Unicode: control, format (directions, zero widths), surrogate, private, unassigned, line and paragraph ends.
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    r"""Write out control, direction and other invisible characters as escapes, except newline and tab.

    A right-to-left override becomes `\u202e`, since it would reorder the text around it; a lone surrogate cannot be
    encoded as UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in INVISIBLE else _written_out(char) for char in text
    )


def _written_out(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"


def duration(seconds: float) -> str:
    """Write a time as people read it: `0.25 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class _Unfailing(io.FileIO):
    """A file descriptor that ignores failed writes: a reader that has exited (`| head`), a log on a full disk."""

    def write(self, data: ReadableBuffer) -> int:
        """Write the data; on an error, pretend that all of it was written."""
        try:
            return super().write(data) or memoryview(data).nbytes
        except OSError:
            return memoryview(data).nbytes


def open_console() -> None:
    """Keep writes to standard output and error from raising: if they are full, closed, or only take ASCII."""
    for name in ("stdout", "stderr"):
        stream: TextIO = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and stream is not None:  # leave streams of notebooks and tests alone
            setattr(sys, name, unfailing(stream))


def unfailing(stream: TextIO) -> TextIO:
    """Return a text stream on the same descriptor whose writes never raise."""
    stream.flush()
    raw = _Unfailing(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="backslashreplace", line_buffering=True
    )
