"""Things that are built once and shared by every run that needs them: the token store, the reference cache.

An entry is a directory named by a hash of all that it depends on. It appears by one rename, so it is there complete or
not at all, whatever kills its builder; runs that start together wait for the first of them.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from config.errors import UserError
from config.files import sync

HASH_CHUNK_BYTES = 1 << 20
TEMPORARY = ".tmp-"


def build_once(directory: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return the entry `directory/key`, built by `build` unless it is there.

    Args:
        directory: The cache; made where it does not exist.
        key: Hash of the entry's content; a file name.
        build: Fills the empty directory that it is given. Runs at most once at a time over all processes that see
            this file system; where it fails, the next process tries again.

    Returns:
        The complete entry, never to be written to.

    Raises:
        UserError: The disk is full. Whatever else `build` raises passes through.
    """
    entry = directory / key
    if entry.is_dir():
        return entry
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is building {entry}; waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        if not entry.is_dir():
            _build(entry, build)
    finally:
        lock.release()
    return entry


def _build(entry: Path, build: Callable[[Path], None]) -> None:
    """Build beside the entry and rename; the caller holds the lock, so any temporary there is a dead process's."""
    for stale in entry.parent.glob(f"{entry.name}{TEMPORARY}*"):
        shutil.rmtree(stale)
    temporary = entry.with_name(f"{entry.name}{TEMPORARY}{os.getpid()}")
    temporary.mkdir()
    try:
        build(temporary)
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        temporary.rename(entry)
        sync(entry.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{entry.parent}: the disk is full; free some space, or name another folder first in local_dirs=[...]"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def usable_dir(candidates: Sequence[str]) -> Path:
    """Return the first directory that can be made and written to (`local_dirs`; ~ and $VARIABLES are expanded).

    Raises:
        UserError: None of them can; each is named with the reason.
    """
    reasons = []
    for candidate in candidates:
        path = Path(os.path.expandvars(candidate)).expanduser()
        probe = path / f"probe{TEMPORARY}{os.getpid()}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            reasons.append(f"{path} ({error.strerror})")
        else:
            return path
    raise UserError(f"local_dirs: none of the folders can be written to: {', '.join(reasons) or 'none is given'}")


def hash_files(paths: Sequence[Path]) -> str:
    """Return the xxh3-128 of the files' contents, in the order given; their names do not count."""
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as source:
            while chunk := source.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
