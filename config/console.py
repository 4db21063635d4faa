"""What reaches the terminal: no escape sequence from a file or a server, and no exception because of a failed write."""

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
    r"""Write out every control, direction and other invisible character; newline and tab stay.

    A right-to-left override becomes `\u202e`, or it would reorder what stands around it; a lone surrogate
    is no UTF-8.
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
    """A descriptor that swallows what cannot be written: a reader that is gone (`| head`), a log on a full disk."""

    def write(self, data: ReadableBuffer) -> int:
        """Write what can be written; what cannot counts as written."""
        try:
            return super().write(data) or memoryview(data).nbytes
        except OSError:
            return memoryview(data).nbytes


def open_console() -> None:
    """Let no write to standard output or error end the work: neither a full or closed one, nor one that is ASCII."""
    for name in ("stdout", "stderr"):
        stream: TextIO = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and stream is not None:  # not what a notebook or a test put there
            setattr(sys, name, unfailing(stream))


def unfailing(stream: TextIO) -> TextIO:
    """Return a text stream on the same descriptor whose writes never raise."""
    stream.flush()
    raw = _Unfailing(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=stream.encoding, errors="backslashreplace", line_buffering=True
    )
