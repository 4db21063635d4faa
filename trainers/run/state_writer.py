"""Write the shards of `state/` with torch.distributed.checkpoint (DCP), and hash them while they are written.

Each process hashes its own shards, and DCP sends the digests to rank 0 with the other metadata. Hashing in rank 0 would
mean reading back the shards of all machines.
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
    digest: str  # of the whole file that contains the item


class _HashingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.digests: dict[str, str] = {}  # file name -> digest

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IOBase]:
        assert mode == "wb", "for writing only"
        raw, crc32 = HashedFile(path), get_crc32_options()
        # torch.load does not check the CRC-32, and it takes ten times as long as our digest.
        set_crc32_options(False)
        try:
            with BufferedWriter(raw) as stream:
                yield cast(IOBase, stream)
        finally:
            set_crc32_options(crc32)
        self.digests[Path(path).name] = raw.hexdigest()


class HashingWriter(dcp.FileSystemWriter):
    """DCP's writer; after a save, `digests` in rank 0 maps the shard files of all processes to their digests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = self._hashing = _HashingFileSystem()
        self.digests: dict[Path, str] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's shards; the returned results, with the digests, are sent to rank 0."""
        written = super().write_data(plan, planner).wait()
        digests = self._hashing.digests
        done: Future[list[WriteResult]] = Future()
        done.set_result([_HashedResult(**vars(one), digest=digests[one.storage_data.relative_path]) for one in written])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, in rank 0, from the results of all processes."""
        for result in (one for rank in results for one in rank if isinstance(one, _HashedResult)):
            self.digests[Path(self.path, result.storage_data.relative_path)] = result.digest
        super().finish(metadata, results)
