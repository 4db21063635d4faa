"""Writing the shards of `state/` with torch.distributed.checkpoint, hashed while they are written.

Each process hashes its own, and DCP brings the digests to rank 0 with what else it tells there of a shard. Rank 0 alone
would read all of them again, from a file system that other machines have written to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter, IOBase
from pathlib import Path
from typing import cast

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from config.checksums import HashedFile


@dataclass(frozen=True)
class _HashedResult(WriteResult):
    digest: str  # of the whole file that the item is in


class _HashingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.digests: dict[str, str] = {}  # by the file's name

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IOBase]:
        assert mode == "wb", "a reader has its own"
        raw, crc32 = HashedFile(path), get_crc32_options()
        # torch.load looks at no CRC-32, and to compute it takes ten times as long as the digest that is looked at.
        set_crc32_options(False)
        try:
            with BufferedWriter(raw) as stream:
                yield cast(IOBase, stream)
        finally:
            set_crc32_options(crc32)
        self.digests[Path(path).name] = raw.hexdigest()


class HashingWriter(dcp.FileSystemWriter):
    """DCP's writer; after its save `digests` has in rank 0 the digests of all processes' shards, by file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = self._hashing = _HashingFileSystem()
        self.digests: dict[Path, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's shards; what is returned of each travels to rank 0."""
        written = super().write_data(plan, planner).wait()
        digests = self._hashing.digests
        done: Future[list[WriteResult]] = Future()
        done.set_result([_HashedResult(**vars(one), digest=digests[one.storage_data.relative_path]) for one in written])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, in rank 0, from what all processes returned."""
        for result in (one for rank in results for one in rank if isinstance(one, _HashedResult)):
            self.digests[Path(self.path, result.storage_data.relative_path)] = result.digest
        super().finish(metadata, results)
