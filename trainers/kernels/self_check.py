"""Compare a model's states on packed rows with its states on each sequence alone, before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from config.errors import UserError
from trainers.data.layout import PackedLayout
from trainers.kernels.attention import packed_states

# Length of a shared prefix, and the segments of a few rows. The cases: two responses; one response, for which another
# kernel may run if no prefix is shared; and enough positions for several blocks of scores, as in training. No sequence
# is longer than the shortest context of a model in use.
CHECKED_ROWS: tuple[tuple[int, list[tuple[int, ...]]], ...] = (
    (0, [(16, 12, 10), (1, 2, 30)] * 2),
    (0, [(16, 30), (1, 20)] * 2),
    (3, [(16, 12, 10), (1, 2, 30)] * 4),
)
NOT_NEEDED = [0, 4, 8, 200]  # places in the last case whose states are not requested
# Exceptions of model code that does not support the mask, the positions or the arguments it is given.
PROBE_ERRORS = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError)


@torch.no_grad()
def packed_and_alone(model: Any, *, device: torch.device, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return the hidden states of packed rows, and of their sequences run alone: (P, D) each; shared positions once.

    The last rows are included again, run with `needed` (only some states requested).

    Raises:
        UserError: for a model that does not run on packed rows at all.
    """
    packed, alone = [], []
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for num_shared, shapes in CHECKED_ROWS:
            batch, states = _checked_batch(model, num_shared, shapes, device)
            alone.append(states)
            packed.append(_probe(model, batch))
        needed = torch.ones(len(packed[-1]), dtype=torch.bool, device=device)
        needed[NOT_NEEDED] = False
        needed = needed.nonzero().squeeze(1)
        packed.append(_probe(model, {**batch, "needed": needed})[needed])
        alone.append(alone[-1][needed])
    return torch.cat(packed), torch.cat(alone)


def _checked_batch(
    model: Any, num_shared: int, shapes: list[tuple[int, ...]], device: torch.device
) -> tuple[dict[str, Any], Tensor]:
    """Return packed rows of random tokens, and the states of each sequence run alone, in the order of the places."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    sizes = [num_shared, *map(sum, shapes)]
    prefix, *rows = torch.randint(vocabulary, (sum(sizes),), generator=generator).to(device).split(sizes)
    alone, positions = [], []
    for i, (row, shape) in enumerate(zip(rows, shapes, strict=True)):
        prompt, *responses = row.split(shape)
        for n, response in enumerate(responses):
            sequence = torch.cat([prefix, prompt, response])
            states = model.base_model(input_ids=sequence[None], use_cache=False).last_hidden_state[0]
            # Take the prefix from the first row only, and the prompt from the first response only.
            skipped = len(sequence) - len(response) if n else num_shared if i else 0
            alone.append(states[skipped:])
            positions.append(torch.arange(skipped, len(sequence), device=device))
    prefix_lengths = torch.tensor([num_shared] + [0] * (len(shapes) - 1))
    prefix_rows = torch.zeros_like(prefix_lengths) if num_shared else None
    batch = {
        "input_ids": torch.cat([prefix, *rows]),
        "position_ids": torch.cat(positions),
        "layout": PackedLayout(torch.tensor(shapes), prefix_lengths, prefix_rows),
    }
    return batch, torch.cat(alone)


def _probe(model: Any, batch: Mapping[str, Any]) -> Tensor:
    try:
        return packed_states(model, batch)
    except UserError:
        raise
    except PROBE_ERRORS as error:
        raise UserError(
            f"{type(model).__name__} cannot run on packed rows: write packing=false ({type(error).__name__}: {error})."
        ) from error


def check_packed_attention(packed: Tensor, alone: Tensor, name: str, autocast: torch.dtype | None = None) -> None:
    """Compare the two results of `packed_and_alone`, up to rounding in their compute dtype.

    Raises:
        UserError: if they differ, because the model (of this name) handles attention, mask or positions in its own way.
    """
    size = alone.norm(dim=-1).clamp(min=1e-6)  # a padding token at the start may have a state of zeros
    error = ((packed - alone).norm(dim=-1) / size).max().item()
    tolerance = 1e-3 if alone.dtype.itemsize > 2 and autocast is None else 0.1
    if not error <= tolerance:
        raise UserError(
            f"{name} computes other states for packed rows than for each sequence alone (relative difference "
            f"{error:.1g}, at most {tolerance} is rounding): its attention, mask or positions differ from those of "
            "Llama, Mistral, Qwen, GPT-NeoX, GPT-2 and GPT-J. Write packing=false."
        )
