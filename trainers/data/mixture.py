"""Which rows of several datasets are trained on together, by the shares that each is to have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def mixture(num_rows: Mapping[str, int], weights: Mapping[str, float | None]) -> dict[str, Tensor]:
    """Choose rows of each dataset so that they have their shares; no row is repeated, and as many as can be are used.

    With another weight a dataset's rows are a part of the same order, so one choice holds the other. A dataset without
    any row, the rest's share of none, takes no part.

    Args:
        num_rows: Rows by dataset.
        weights: Shares by dataset, checked (`checks_train`): all given ones sum to 1, or some to less; those without a
            weight share the rest by their sizes.

    Returns:
        The rows (M,) int64 of each dataset, counted from its own first, in ascending order.
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
