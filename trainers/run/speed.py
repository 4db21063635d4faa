"""How fast a run is: examples, tokens and the arithmetic of its model per second."""

from __future__ import annotations

from typing import Any

from trainers.data.batching import GlobalBatch
from trainers.data.packing import num_positions, num_target_tokens, num_tokens
from trainers.distributed.layout import Layout
from trainers.kernels.flops import head_flops_per_target, peak_flops, training_flops_per_token
from trainers.run.metrics import MetricSums, peak_memory_gib


class Speed:
    """Adds the rates of each step to the metrics; all of it is known on the host."""

    def __init__(self, model: Any, layout: Layout) -> None:
        self._layout = layout
        self._peak_flops = peak_flops(layout.device)
        self._block_flops, self._head_flops = training_flops_per_token(model), head_flops_per_target(model)

    def add(self, metrics: MetricSums, batch: GlobalBatch, *, step_seconds: float, wait_seconds: float) -> None:
        """Add the rates of a step on a global batch.

        The processes' totals are divided by their summed seconds, which is a mean over the processes: what each of them
        counts for itself is multiplied by their number.
        """
        seconds = step_seconds + wait_seconds
        tokens = sum(int(num_tokens(one)) for one in batch.microbatches)
        metrics.add("examples_per_second", batch.num_examples, seconds)
        metrics.add("tokens_per_second", tokens * self._layout.world_size, seconds)
        metrics.add("data_wait_seconds", wait_seconds, 1.0)
        if self._peak_flops is not None:
            # The head runs where a target is predicted, not at every position.
            head = self._head_flops * sum(int(num_target_tokens(one)) for one in batch.microbatches)
            blocks = self._block_flops * sum(map(num_positions, batch.microbatches))
            metrics.add("mfu", blocks / self._peak_flops, seconds)
            metrics.add("mfu_with_head", (blocks + head) / self._peak_flops, seconds)
        metrics.peak("memory/peak", peak_memory_gib(self._layout.device))
