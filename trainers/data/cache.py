"""A cache of what is built once and shared by runs: token stores and reference log-probabilities.

An entry is a directory named by a hash of everything it depends on. It is put in place by one rename, so it is complete
or absent, even if its builder is killed. Runs that start together wait for the first to build it. Each process that
opens an entry verifies its checksums; a damaged entry (failing disk, truncated copy) is rebuilt.
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
    """Return the read-only entry `directory/key`; call `build` first if it is missing or damaged.

    Args:
        directory: The cache; created if missing.
        key: Hash of everything the entry depends on; used as a file name.
        build: Fills the empty directory that it is given. Only one process on this file system runs it at a time; if
            it fails, the next process tries again.

    Raises:
        UserError: The disk is full or the folder is not writable. Other errors of `build` pass through.
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
    """Return whether an entry exists, was made for its own key, and matches its checksums."""
    return entry.is_dir() and not find_damage(entry, owner=entry.name)


def _not_writable(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"{directory} cannot be written to ({error.strerror}); it may belong to another user. Put another folder first "
        "in local_dirs=[...]"
    )


def _build(entry: Path, build: Callable[[Path], None]) -> None:
    """Build in a temporary directory, then rename. The caller holds the lock, so other temporaries are leftovers."""
    try:
        if entry.is_dir():
            damage = find_damage(entry, owner=entry.name)
            print(f"note: {entry} is damaged ({damage}); rebuilding it", file=sys.stderr, flush=True)
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT, None):  # None: numpy's tofile raises without errno
            raise UserError(
                f"{entry.parent}: the disk is full; free some space, or put another folder first in local_dirs=[...]"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def usable_dir(candidates: Sequence[str]) -> Path:
    """Return the first directory that is or can be made writable (`local_dirs`; ~ and $VARIABLES are expanded).

    Raises:
        UserError: None is writable; the message gives the reason for each.
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
