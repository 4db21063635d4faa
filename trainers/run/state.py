"""The state of an optimizer and of the random generators, in plain forms for a checkpoint.

A quantised tensor (torchao's 8-bit states) is a subclass that wraps a few plain tensors: codes, scales, a map.
torch.distributed.checkpoint would copy it with operators that it does not implement, and write it as a pickle that runs
code. So its inner tensors are saved and loaded instead. They share memory with the wrapper, so loading into them loads
the wrapper.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trainers.distributed.sharding import local_part


def _is_wrapper(value: Any) -> bool:
    # A DTensor is a wrapper too, but DCP handles it.
    return local_part(value) is value and is_traceable_wrapper_subclass(value)


def plain_state(state: Any) -> Any:
    """Return a nested dict like `state`, with each wrapper tensor replaced by a dict of its inner tensors by name."""
    if isinstance(state, dict):
        return {key: plain_state(value) for key, value in state.items()}
    if _is_wrapper(state):
        return {name: plain_state(getattr(state, name)) for name in state.__tensor_flatten__()[0]}
    return state


def wrapped_state(plain: Any, state: Any) -> Any:
    """Undo `plain_state`: return `plain`, made from `state` and filled since, with the wrapper tensors put back."""
    if isinstance(state, dict):
        return {key: wrapped_state(value, state[key]) for key, value in plain.items()}
    return state if _is_wrapper(state) else plain


def random_state() -> dict[str, Any]:
    """Return the state of this process's random generators, ready for JSON."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore `random_state()`; the GPU's generator is left alone if the state comes from a machine without a GPU."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
