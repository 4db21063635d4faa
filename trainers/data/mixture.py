"""Mix several datasets: choose the rows of each that give the configured shares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def mixture(num_rows: Mapping[str, int], weights: Mapping[str, float | None]) -> dict[str, Tensor]:
    """Choose rows of each dataset to match the shares, without repeating rows, and as many as possible.

    Each dataset has a fixed random order and contributes the beginning of it, so for two weights one choice contains
    the other. A dataset without rows and without a weight contributes nothing.

    Args:
        num_rows: Rows by dataset.
        weights: Shares by dataset, already checked (`checks_train`): they sum to 1, or to less if datasets without a
            weight share the rest in proportion to their sizes.

    Returns:
        The row numbers (M,) int64 of each dataset, in ascending order.
    """
    rest = 1 - sum(weight for weight in weights.values() if weight is not None)
    others = sum(num_rows[name] for name, weight in weights.items() if weight is None)
    shares = {
        name: rest * num_rows[name] / max(others, 1) if weight is None else weight for name, weight in weights.items()
    }
    total = min((num_rows[name] / share for name, share in shares.items() if share > 0), default=0.0)
    chosen = {}
    for name, share in shares.items():
        order = torch.randperm(num_rows[name], generator=torch.Generator().manual_seed(0))
        chosen[name] = order[: round(share * total)].sort().values
    return chosen
