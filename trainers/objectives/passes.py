"""The forward passes of a global batch, and the log-probabilities of all its rows where a loss asks for them.

Some losses know what a row counts only when they have seen the whole global batch: `aot` sorts it, `kto` and `bco_pair`
take a mean over it. A batch of one micro-batch is run once, and the processes tell each other what they found between
its forward and its backward pass. Of several micro-batches the graphs are not kept: they are run once more.

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
    policy: Tensor  # (B, C) as the loss weighs tokens, with gradient
    reference: Tensor  # (B, C) likewise; zeros where no reference is read
    plain: Tensor  # (B, C) of the policy, every token counted
    num_tokens: Tensor  # (B, C) int64
    agreements: Tensor  # (B, C) of `sequence_logps`; zeros where none are read

    def detached(self) -> Responses:
        """Drop the graph."""
        return Responses(*(values.detach() for values in self))

    def places(self, rows: Tensor) -> Tensor:
        """Return where rows (B,) stand among these, which ascend; of a row that is not here, any place."""
        return torch.searchsorted(self.rows, rows).clamp(max=len(self.rows) - 1)

    def with_gradient_of(self, own: Responses) -> Responses:
        """Return these rows with those of a micro-batch in the place of themselves."""
        places = self.places(own.rows)
        return Responses(*(all_.index_copy(0, places, one) for all_, one in zip(self, own, strict=True)))


class ForwardPasses:
    """From micro-batches to `Responses`."""

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
        """Return the rows of the global batch, (G,) ascending, from all processes; no gradient.

        `passes` are this process's micro-batches, each with whether it counts; as many as the others have.
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
