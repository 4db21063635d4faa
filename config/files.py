"""Write files so that a reader, or a crash, sees the old content or the new, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file or directory durable: a rename must not reach the disk before what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Give a path beside `path` to write a file to, and rename that file to `path` if the block ends well.

    With `durable` it waits until the file has reached the disk, so that a power cut, too, leaves the old or the new
    one.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
        if durable:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace a file by one with this text, UTF-8; a lone surrogate, which is no UTF-8, is written as its escape."""
    with replacing(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
