"""Sums of what is measured, over micro-batches, steps and processes, until a row of the log takes their means.

The names are the DPO repo's (`loss/train`, `rewards_eval/accuracies`, ...); others stand beside them.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from trainers.distributed.layout import gather_objects


class MetricSums:
    """Sums and counts of named quantities; a sum stays on the device where it was made until it is asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}  # a tensor (float64) where it is a GPU's: to read it is to wait
        self._counts: dict[str, float] = {}
        self._peaks: dict[str, float] = {}

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        """Add a sum (scalar) over `count` things to a quantity's mean."""
        if isinstance(total, Tensor):
            total = total.detach().double()
            total = total.item() if total.device.type == "cpu" else total
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + float(count)

    def peak(self, name: str, value: float) -> None:
        """Note a quantity whose largest value over steps and processes is what matters."""
        self._peaks[name] = max(value, self._peaks.get(name, value))

    def state(self) -> dict[str, tuple[float, float]]:
        """Return this process's sums and counts, as JSON. Waits for the device once."""
        on_device = {name: total for name, total in self._sums.items() if isinstance(total, Tensor)}
        values = torch.stack(list(on_device.values())).tolist() if on_device else []
        totals = {**self._sums, **dict(zip(on_device, values, strict=True))}
        return {name: (float(total), self._counts[name]) for name, total in totals.items()}

    def load(self, state: Mapping[str, tuple[float, float]]) -> None:
        """Put `state()` back."""
        self._sums = {name: total for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}

    def means(self) -> dict[str, float]:
        """Return the mean of every quantity over all that was added, by all processes; then begin again, empty.

        Every process must come here, with the same names. They talk once, on the host.
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
    """Return the most memory that this process has held: the allocator's on a GPU, resident memory on a CPU. In GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB here
