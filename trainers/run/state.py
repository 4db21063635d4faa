"""The state of an optimizer and of the random generators, in forms that any checkpoint can hold.

A quantised tensor (torchao's states of 8 bits) is a subclass with a few plain tensors inside: codes, scales, a map.
torch.distributed.checkpoint would copy such a class by operators that it lacks, and write it as a pickle of code. The
parts are copied, written and read as any other tensor; they share the memory of the whole, so that a checkpoint that is
read into them is read into it.
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
    # A DTensor, which has a local part, is one, too; but DCP knows it.
    return local_part(value) is value and is_traceable_wrapper_subclass(value)


def plain_state(state: Any) -> Any:
    """Return a nested dict like `state`, in which a dict of its parts, by name, stands for each wrapping tensor."""
    if isinstance(state, dict):
        return {key: plain_state(value) for key, value in state.items()}
    if _is_wrapper(state):
        return {name: plain_state(getattr(state, name)) for name in state.__tensor_flatten__()[0]}
    return state


def wrapped_state(plain: Any, state: Any) -> Any:
    """Return `plain`, made by `plain_state` of `state` and filled since then, with the wrapping tensors put back."""
    if isinstance(state, dict):
        return {key: wrapped_state(value, state[key]) for key, value in plain.items()}
    return state if _is_wrapper(state) else plain


def random_state() -> dict[str, Any]:
    """Return the state of this process's random generators, as JSON."""
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
    """Put `random_state()` back; a GPU's generator stays as it is if the state is of a machine without one."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
