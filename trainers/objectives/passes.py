"""The forward passes of a global batch, and the log-probabilities of all its rows for losses that need them.

Some losses depend on the whole global batch: `aot` sorts it, `kto` and `bco_pair` take a mean over it. A single
micro-batch is run once, and the processes exchange log-probabilities between its forward and its backward pass. Several
micro-batches are run twice, first without gradients, so that the graph of only one is kept at a time.

Letters: B = rows of a micro-batch, G = rows of the global batch, C = responses of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from trainers.distributed.layout import gather_objects
from trainers.losses.lengths import response_logps
from trainers.losses.responses import LogpsOf


class Responses(NamedTuple):
    """Log-probabilities of the C responses of some rows: chosen and rejected, or an answer and another row's."""

    rows: Tensor  # (B,) int64
    policy: Tensor  # (B, C) with the loss's token weights, with gradient
    reference: Tensor  # (B, C) likewise; zeros for a loss without reference
    plain: Tensor  # (B, C) of the policy, without token weights
    num_tokens: Tensor  # (B, C) int64
    agreements: Tensor  # (B, C) of `sequence_logps`; zeros if not requested

    def detached(self) -> Responses:
        """Drop the graph."""
        return Responses(*(values.detach() for values in self))

    def places(self, rows: Tensor) -> Tensor:
        """Return the places of rows (B,) among these, which are sorted; any place for a row that is missing."""
        return torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)

    def with_gradient_of(self, own: Responses) -> Responses:
        """Return these rows, with the rows of a micro-batch replaced by `own`, which has gradients."""
        places = self.places(own.rows)
        return Responses(*(all_.index_copy(0, places, one) for all_, one in zip(self, own, strict=True)))


class ForwardPasses:
    """Maps micro-batches to `Responses`."""

    def __init__(self, *, needs_reference: bool, ld_alpha: float | None = None, agreements: bool = False) -> None:
        self._needs_reference, self._ld_alpha, self._agreements = needs_reference, ld_alpha, agreements
        self._ready: list[Responses] = []

    def __call__(self, logps_of: LogpsOf, batch: TensorDict) -> Responses:
        """Run a micro-batch, unless `whole_batch` has just done it."""
        return self._ready.pop() if self._ready else self._run(logps_of, batch)

    def _run(self, logps_of: LogpsOf, batch: TensorDict) -> Responses:
        ran = response_logps(logps_of, batch, self._ld_alpha, self._agreements)
        policy, plain, num_tokens, *more = (values.view(len(batch["row"]), -1) for values in ran)
        reference = torch.zeros_like(policy)
        if self._needs_reference:
            reference = batch["reference_logps"].to(policy)
        agreements = more[0] if more else torch.zeros_like(plain)
        return Responses(batch["row"], policy, reference, plain, num_tokens, agreements)

    def whole_batch(
        self, logps_of: LogpsOf, passes: Sequence[tuple[TensorDict, bool]], device: torch.device
    ) -> Responses:
        """Return all rows of the global batch, (G,) sorted, from all processes, without gradient.

        `passes` are this process's micro-batches, each with whether it counts; the same number in every process.
        """
        alone = len(passes) == 1
        with torch.set_grad_enabled(alone and torch.is_grad_enabled()):
            ran = [self._run(logps_of, batch.to(device, non_blocking=True)) for batch, _ in passes]
        self._ready = ran if alone else []
        own = [one.detached() for one, (_, counts) in zip(ran, passes, strict=True) if counts]
        columns = [torch.cat(column).cpu() for column in zip(*own, strict=True)]
        parts = [part for part in gather_objects(columns) if part]
        whole = Responses(*(torch.cat(column).to(device) for column in zip(*parts, strict=True)))
        order = whole.rows.argsort()
        return Responses(*(values[order] for values in whole))
