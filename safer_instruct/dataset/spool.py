"""Lines on the disk in buckets by a hash of their key: what belongs together is loaded together, one bucket at a time.

A join or a search for repetitions over any number of rows so needs the memory of one bucket.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

BUCKET_ROWS = 16_384  # wanted size of a bucket
MAX_BUCKETS = 512
BUFFER_BYTES = 4_000_000  # of all buckets together
LINE_BYTES = 48  # that Python needs for each line beside its text


def num_buckets(num_rows: int) -> int:
    """How many buckets so many rows want."""
    return max(1, min(MAX_BUCKETS, -(-num_rows // BUCKET_ROWS)))


class Spool:
    """Appends lines to bucket files; reads them back bucket by bucket, in the order in which they were added."""

    def __init__(self, folder: Path, name: str, count: int) -> None:
        self.count = count
        self._paths = [folder / f"{name}-{bucket:03d}" for bucket in range(count)]
        self._buffers: list[list[bytes]] = [[] for _ in range(count)]
        self._num_buffered = 0

    def add(self, key: str, line: bytes) -> None:
        """Append a line, which ends in a newline, to the bucket of its key."""
        self._buffers[zlib.crc32(key.encode("utf-8", "surrogatepass")) % self.count].append(line)
        self._num_buffered += len(line) + LINE_BYTES
        if self._num_buffered > BUFFER_BYTES:
            self._flush()

    def read(self, bucket: int) -> Iterator[bytes]:
        """Yield the lines of one bucket."""
        self._flush()
        if self._paths[bucket].exists():
            with self._paths[bucket].open("rb") as file:
                yield from file

    def _flush(self) -> None:
        # Files are opened for one write each: any number of buckets needs no more than one open file.
        for path, lines in zip(self._paths, self._buffers, strict=True):
            if lines:
                with path.open("ab") as file:
                    file.writelines(lines)
                lines.clear()
        self._num_buffered = 0
