"""Detect damage in folders that we wrote: `checksums.xxh3.json`, written last, holds size and hash of each file.

Checkpoints, token stores, reference caches, datasets and reports all use it. Sizes are checked when a folder is opened,
contents when they are read; the reader decides what to do about damage. Files that are not listed, such as a note that
somebody added, are ignored.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from xxhash import xxh3_128

from config.errors import UserError
from config.files import write_text

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CHECKSUMS = "checksums.xxh3.json"
NUM_THREADS = 4
CHUNK_BYTES = 1 << 20  # small enough to stay in a core's cache between reading and hashing


def everything(name: str) -> bool:
    """Choose every file (see `find_damage`)."""
    return True


class HashedFile(io.FileIO):
    """A new file that hashes everything written to it, so that it need not be read again."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "w")
        self._digest = xxh3_128()

    def write(self, data: ReadableBuffer) -> int:
        """Write and hash in chunks, since a chunk just written is still in the core's cache."""
        content, start = memoryview(data).cast("B"), 0
        while start < len(content):
            written = super().write(content[start : start + CHUNK_BYTES])
            self._digest.update(content[start : start + written])
            start += written
        return start

    def hexdigest(self) -> str:
        """Return the digest of everything written, equal to `hash_prefix` of the file."""
        return self._digest.hexdigest()


def write_checksums(
    folder: Path, *, owner: str, files: Iterable[Path] | None = None, known: Mapping[Path, str] | None = None
) -> None:
    """Write the checksums of a folder whose files are complete.

    `owner` says what the folder was made for; readers compare it, so that no other folder can take its place. `files`
    are the files to list; None: all of them, at any depth. `known` holds digests that were computed while writing;
    the other files are read.
    """
    digests = dict(known or {})
    chosen = sorted(path for path in (folder.rglob("*") if files is None else files) if path.is_file())
    chosen = [path for path in chosen if path != folder / CHECKSUMS]
    unknown = [path for path in chosen if path not in digests]
    digests |= zip(unknown, _hash_all(unknown), strict=True)
    record = {path.relative_to(folder).as_posix(): [path.stat().st_size, digests[path]] for path in chosen}
    write_text(folder / CHECKSUMS, json.dumps({"owner": owner, "files": record}, indent=1) + "\n")


def find_damage(
    folder: Path,
    *,
    owner: str | None,
    files: Callable[[str], bool] = everything,
    contents: Callable[[str], bool] = everything,
    part: tuple[int, int] = (0, 1),
) -> str:
    """Return what is wrong with a folder, as a clause for a message; "" if it is as written.

    Args:
        folder: A folder with a record by `write_checksums`.
        owner: What it must have been made for; None: any owner.
        files: Which files to check for existence and size, by name relative to the folder.
        contents: Which of those files to hash, too.
        part: (i, n): hash every n-th file from the i-th on, so that n processes together hash all of them.
    """
    try:
        record = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        found = sorted((name, size, digest) for name, (size, digest) in record["files"].items() if files(name))
        if owner not in (None, record["owner"]):
            return f"it was made for {record['owner']!r}, not for {owner!r}"
        for name, size, _ in found:
            size_now = (folder / name).stat().st_size
            if size_now != size:
                return f"{name!r} has {size_now} bytes, {size} were written"
        hashed = [(name, digest) for name, _, digest in found if contents(name)]
        own = hashed[part[0] :: part[1]]
        for (name, digest), now in zip(own, _hash_all([folder / name for name, _ in own]), strict=True):
            if now != digest:
                return f"the content of {name!r} is not what was written"
    except OSError as error:
        name = str(error.filename).removeprefix(f"{folder}/")
        return f"{name!r}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{CHECKSUMS} cannot be read"
    return ""


def require_untouched(path: Path, *, owner: str | None = None, contents: Callable[[str], bool] = everything) -> None:
    """Reject a file or folder that differs from the record in its folder or above; without a record it passes.

    `owner` and `contents` are those of `find_damage`.

    Raises:
        UserError: Names the file that has changed.
    """
    path = path.absolute()
    folder = next((one for one in (path, *path.parents[:2]) if (one / CHECKSUMS).is_file()), None)
    if folder is None:
        return
    below = path.relative_to(folder).as_posix()

    def matters(name: str) -> bool:
        return below in (".", name) or name.startswith(f"{below}/")

    damage = find_damage(folder, owner=owner, files=matters, contents=contents)
    if damage:
        raise UserError(
            f"{folder}: {damage}. Copy or make it again; if the change is intended, delete {folder / CHECKSUMS}"
        )


def _hash_all(paths: Sequence[Path]) -> Iterator[str]:
    """Hash files in parallel threads, which works because reading and hashing release the GIL."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        yield from pool.map(hash_prefix, paths)


def hash_prefix(path: Path, size: int | None = None) -> str:
    """Return the xxh3-128 of a file's first `size` bytes (None: all), as 32 hex digits."""
    digest, left = xxh3_128(), path.stat().st_size if size is None else size
    chunk = memoryview(bytearray(CHUNK_BYTES))  # reused, because allocating a chunk takes as long as hashing it
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(chunk[: min(left, CHUNK_BYTES)]):
            digest.update(chunk[:num_read])
            left -= num_read
    return digest.hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """Return the xxh3-128 of the files' contents, in the given order; their names do not count."""
    return xxh3_128(" ".join(map(hash_prefix, paths)).encode()).hexdigest()
