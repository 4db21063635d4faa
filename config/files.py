"""Write files atomically: a reader, or a crash, sees either the old or the new content, never a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file or directory to disk, because a rename must not reach the disk before the renamed file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path` to write to, and rename it to `path` if the block succeeds.

    With `durable`, wait until the file has reached the disk, so that even a power cut leaves the old or the new file.
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
    """Replace a file by this text in UTF-8; a lone surrogate, which UTF-8 cannot encode, is written as its escape."""
    with replacing(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
