"""The state of an optimizer as plain tensors, which any checkpoint can hold, whatever class its tensors have.

A quantised tensor (torchao's states of 8 bits) is a subclass with a few plain tensors inside: codes, scales, a map.
torch.distributed.checkpoint would copy such a class by operators that it lacks, and write it as a pickle of code. The
parts are copied, written and read as any other tensor; they share the memory of the whole, so that a checkpoint that is
read into them is read into it.
"""

from __future__ import annotations

from typing import Any

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
