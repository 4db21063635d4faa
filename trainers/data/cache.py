"""Things that are built once and shared by every run that needs them: the token store, the reference cache.

An entry is a directory named by a hash of all that it depends on. It appears by one rename, so it is there complete or
not at all, whatever kills its builder; runs that start together wait for the first of them. Its contents are hashed
once by each process that opens it, and an entry that is not what was written (a disk that fails, a copy cut short) is
built again.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from config.checksums import find_damage, write_checksums
from config.errors import UserError
from config.files import sync

TEMPORARY = ".tmp-"


def build_once(directory: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return the entry `directory/key`, never to be written to, built by `build` unless it is there and whole.

    Args:
        directory: The cache; made where it does not exist.
        key: Hash of the entry's content; a file name.
        build: Fills the empty directory that it is given. Runs at most once at a time over all processes that see
            this file system; where it fails, the next process tries again.

    Raises:
        UserError: The disk is full, or the folder is another user's. Whatever else `build` raises passes through.
    """
    entry = directory / key
    if is_whole(entry):
        return entry
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / f"{key}.lock")
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is building {entry}; waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    except PermissionError as error:
        raise _not_writable(directory, error) from error
    try:
        if not is_whole(entry):
            _build(entry, build)
    finally:
        lock.release()
    return entry


def is_whole(entry: Path) -> bool:
    """Return whether an entry is there, made for its own key, and as it was written to the last bit."""
    return entry.is_dir() and not find_damage(entry, owner=entry.name)


def _not_writable(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"{directory} cannot be written to ({error.strerror}), it may be another user's; name another folder first in "
        "local_dirs=[...]"
    )


def _build(entry: Path, build: Callable[[Path], None]) -> None:
    """Build beside the entry and rename; the caller holds the lock, so any temporary there is a dead process's."""
    try:
        if entry.is_dir():
            damage = find_damage(entry, owner=entry.name)
            print(f"note: {entry} is damaged ({damage}); it is built again", file=sys.stderr, flush=True)
            entry.rename(entry.with_name(f"{entry.name}{TEMPORARY}damaged-{os.getpid()}"))  # deleted below
        for stale in entry.parent.glob(f"{entry.name}{TEMPORARY}*"):
            stale.unlink() if stale.is_symlink() else shutil.rmtree(stale)
        temporary = entry.with_name(f"{entry.name}{TEMPORARY}{os.getpid()}")
        temporary.mkdir()
    except PermissionError as error:
        raise _not_writable(entry.parent, error) from error
    try:
        build(temporary)
        write_checksums(temporary, owner=entry.name)
        for path in temporary.rglob("*"):
            sync(path)
        sync(temporary)
        temporary.rename(entry)
        sync(entry.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, None):  # numpy's tofile says only that a write was short
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
