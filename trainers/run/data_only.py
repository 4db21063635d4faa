"""Load a torch.distributed.checkpoint (DCP) folder safely, although its index and small values are pickles.

A run directory may come from somebody else, and a pickle can run code. So only the classes that DCP itself writes are
allowed in the index, and `weights_only=True` for the values; anything else is refused before it is constructed.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_METADATA = "torch.distributed.checkpoint.metadata"
KNOWN = {
    *((_METADATA, name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # maps the name of a layout to the layout
    ("torch", "Size"),
    *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),  # moved in Python 3.13
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN or (module == "torch" and isinstance(vars(torch).get(name), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"refused: it names {module}.{name}, which could run code; nothing was run")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{self.path}/.metadata holds no index")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        content = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], content)


def load_data_only(state: dict[str, Any], folder: Path) -> None:
    """Fill `state` from a DCP folder, as `dcp.load` does; every process must call it.

    Raises:
        CheckpointException: A part is missing, does not fit, or is not pure data (then it holds an UnpicklingError).
    """
    dcp.load(state, storage_reader=_Reader(folder), planner=_Planner())
