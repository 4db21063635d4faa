"""Tokenised rows on disk, memory-mapped, so that resident memory does not grow with the number of rows.

A store is a directory of `tokens.bin` (int32, all rows concatenated), `offsets.bin` (int64, where each row starts),
`lengths.bin` (int32, N x S), `ids.bin` (N fixed-width names), `meta.json` and, for judged answers, `is_good.bin`
(N bytes).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_128, xxh3_128_hexdigest

ID_BYTES = 32


def split_given(response: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token ids of a response (T,), and a mask (T,) of those that are given, not targets.

    Tokens between two answers of a conversation are given: read, but not trained on. A given t is stored as ~t (< 0).
    """
    is_given = response < 0
    return response.where(~is_given, ~response), is_given


def sequence_lengths(lengths: Tensor) -> Tensor:
    """Return the sequence length of each row, prompt and longest response: (..., S) lengths -> (...) int64."""
    return lengths[..., 0].long() + lengths[..., 1:].amax(-1)


class TokenStore:
    """N rows of S token segments each: (prompt, response), or (prompt, chosen, rejected).

    Attributes:
        num_segments: S.
        key: Hash of everything that the content depends on, including the code that makes it.
        content: Hash of the rows themselves (ids, lengths, tokens), which must be unchanged when a run is resumed.
        meta: What the writer recorded: counts of rows used, dropped and truncated. Never text.
        lengths: (N, S) int32, tokens of each segment.
        columns: Per-row values (N,) by name: `is_good` (bool) for judged answers, otherwise empty.
    """

    def __init__(self, directory: Path) -> None:
        self.meta: dict[str, Any] = json.loads((directory / "meta.json").read_text())
        self.num_segments: int = self.meta["num_segments"]
        self.key: str = self.meta["key"]
        self.content: str = self.meta["content"]
        self._index: Tensor | None = None
        self._tokens = _map(directory / "tokens.bin", np.int32)
        self._offsets = _map(directory / "offsets.bin", np.int64)
        self._ids = np.memmap(directory / "ids.bin", f"S{ID_BYTES}", "r") if len(self._offsets) else np.empty(0, "S1")
        self.lengths = _map(directory / "lengths.bin", np.int32).view(-1, self.num_segments)
        self.columns: dict[str, Tensor] = {}
        if (directory / "is_good.bin").exists():
            self.columns["is_good"] = _map(directory / "is_good.bin", np.uint8).bool()

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, i: int) -> list[Tensor]:
        """Return the S segments of row i, each (T,) int32: read-only views of the memory map."""
        place = i if self._index is None else int(self._index[i])
        start = int(self._offsets[place])
        lengths = self.lengths[i].tolist()
        return list(self._tokens[start : start + sum(lengths)].split(lengths))

    def beginnings(self, rows: Tensor, width: int) -> Tensor:
        """Return the first `width` tokens of rows (B,), all of which must be that long: (B, width) int32."""
        places = rows if self._index is None else self._index[rows]
        return self._tokens[self._offsets[places, None] + torch.arange(width)]

    def ids(self, i: int) -> str:
        """Return the name of row i, for errors and reports."""
        place = i if self._index is None else int(self._index[i])
        return self._ids[place].decode()

    def select(self, rows: Tensor) -> Self:
        """Return a view of rows (M,), int64, in this order; its key and content include the selection."""
        chosen = type(self).__new__(type(self))
        chosen.__dict__.update(self.__dict__)
        chosen._index = rows if self._index is None else self._index[rows]
        chosen.lengths = self.lengths[rows]
        chosen.columns = {name: values[rows] for name, values in self.columns.items()}
        places = rows.numpy().tobytes()
        chosen.key = xxh3_128_hexdigest(self.key.encode() + places)
        chosen.content = xxh3_128_hexdigest(self.content.encode() + places)
        return chosen


def _map(path: Path, dtype: type[np.generic]) -> Tensor:
    """Map a file as a flat tensor, copy-on-write: torch wants writable memory, but the file must not change."""
    if not path.stat().st_size:
        return torch.from_numpy(np.empty(0, dtype))
    return torch.from_numpy(np.memmap(path, dtype, "c"))


class TokenStoreWriter:
    """Writes a store row by row; `finish` completes it. Use as a context manager.

    Args:
        directory: Created by the writer; inside a `build_once` entry, it becomes visible only when complete.
        key: Hash of everything that the content depends on.
        num_segments: S.
    """

    def __init__(self, directory: Path, *, key: str, num_segments: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.num_rows = self._num_tokens = 0
        self._directory, self._key, self._num_segments = directory, key, num_segments
        self._content = xxh3_128()
        self._files = {name: (directory / f"{name}.bin").open("wb") for name in ("tokens", "offsets", "lengths", "ids")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, id: str, segments: Sequence[Sequence[int]], *, is_good: bool | None = None) -> None:
        """Add a row of S segments (token ids); its name `id` has at most ID_BYTES bytes in UTF-8.

        `is_good` is the judgement of an answer; give it for all rows of a store or for none.
        """
        name = id.encode()
        if len(segments) != self._num_segments or not 0 < len(name) <= ID_BYTES:
            raise ValueError(f"a row has {self._num_segments} segments and an id of 1 to {ID_BYTES} bytes")
        lengths = [len(segment) for segment in segments]
        tokens = b"".join(np.asarray(segment, np.int32).tobytes() for segment in segments)
        content = {"ids": name.ljust(ID_BYTES, b"\0"), "lengths": np.asarray(lengths, np.int32).tobytes()}
        if is_good is not None:
            content["is_good"] = bytes([is_good])
            if "is_good" not in self._files:
                self._files["is_good"] = (self._directory / "is_good.bin").open("wb")
        for file, data in {**content, "tokens": tokens}.items():
            self._files[file].write(data)
            self._content.update(data)
        self._files["offsets"].write(self._num_tokens.to_bytes(8, "little"))  # the cumulative lengths
        self._num_tokens += sum(lengths)
        self.num_rows += 1

    def finish(self, meta: dict[str, Any]) -> None:
        """Write meta.json, which completes the store; readers find `meta` (JSON values) in `TokenStore.meta`."""
        for file in self._files.values():
            file.flush()
        counts = {"num_segments": self._num_segments, "num_rows": self.num_rows, "num_tokens": self._num_tokens}
        record = {**meta, "key": self._key, "content": self._content.hexdigest(), **counts}
        (self._directory / "meta.json").write_text(json.dumps(record, indent=1))
