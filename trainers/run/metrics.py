"""Metric sums over micro-batches, steps and processes; each row of the log reports their means.

The names are those of the DPO repo (`loss/train`, `rewards_eval/accuracies`, ...), plus some of our own.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from trainers.distributed.layout import gather_objects


class MetricSums:
    """Sums and counts of named quantities. A sum on a GPU stays there until it is read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}  # float64 tensors if on a GPU, as reading them would synchronise
        self._counts: dict[str, float] = {}
        self._peaks: dict[str, float] = {}

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        """Add a sum (scalar) over `count` units to the mean of a quantity."""
        if isinstance(total, Tensor):
            total = total.detach().double()
            total = total.item() if total.device.type == "cpu" else total
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def peak(self, name: str, value: float) -> None:
        """Record a quantity that is reported as its maximum over steps and processes."""
        self._peaks[name] = max(value, self._peaks.get(name, value))

    def state(self) -> dict[str, tuple[float, float]]:
        """Return this process's (sum, count) pairs, ready for JSON. Synchronises with the GPU once."""
        on_device = {name: total for name, total in self._sums.items() if isinstance(total, Tensor)}
        values = torch.stack(list(on_device.values())).tolist() if on_device else []
        totals = {**self._sums, **dict(zip(on_device, values, strict=True))}
        return {name: (float(total), self._counts[name]) for name, total in totals.items()}

    def load(self, state: Mapping[str, tuple[float, float]]) -> None:
        """Restore what `state()` returned."""
        self._sums = {name: total for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}

    def means(self) -> dict[str, float]:
        """Return the mean of every quantity over all processes, and reset the sums.

        Every process must call it, with the same names. It is a single collective, on the host.
        """
        if not self._sums:
            return {}
        own, peaks = sorted(self.state().items()), sorted(self._peaks.items())
        rows = [pair for _, pair in own] + [(value, 0.0) for _, value in peaks]
        gathered = torch.tensor(gather_objects(rows), dtype=torch.float64)  # (processes, quantities, 2)
        self._sums, self._counts, self._peaks = {}, {}, {}
        totals = gathered[:, : len(own)].sum(0).tolist()
        means = {name: total / count for (name, _), (total, count) in zip(own, totals, strict=True) if count}
        largest = gathered[:, len(own) :, 0].amax(0).tolist()
        return {**means, **{name: value for (name, _), value in zip(peaks, largest, strict=True)}}


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: of torch's allocator on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB here
