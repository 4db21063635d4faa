"""A second copy of a model's weights that follows them: a moving average, or a reference that is renewed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from config.settings import EMASettings
from trainers.distributed.sharding import local_part, reshard


class FollowingWeights:
    """A copy of a model's trained weights that moves by `rate` x (model - copy) at each update; sharded as the model.

    The copy is float32, or the model's dtype if that is wider: in 16 bits, small updates would be rounded away. Frozen
    weights have no copy.

    Attributes:
        values: Name of a parameter -> its copy, a tensor or DTensor. A checkpoint reads them and loads into them.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        """Copy the weights of a model that is already on its devices, sharded or not."""
        self._model, self._rate = model, rate
        self._own = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.values: dict[str, Tensor] = {
            name: one.detach().to(torch.promote_types(one.dtype, torch.float32), copy=True)
            for name, one in self._own.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model's weights; call it between two steps."""
        for name, value in self.values.items():
            value = local_part(value)
            value.lerp_(local_part(self._own[name]).to(value.dtype), self._rate)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put these weights into the model; its own are backed up in their dtype, which takes as much as gradients."""
        reshard(self._model)
        own = {name: local_part(one).detach().clone() for name, one in self._own.items()}
        try:
            self._fill(self.values)
            yield
        finally:
            reshard(self._model)
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            local_part(self._own[name]).copy_(local_part(value))


class WeightAverage:
    """The exponential moving average of a policy's weights, w <- decay w + (1 - decay) policy; or none."""

    def __init__(self, policy: nn.Module, settings: EMASettings) -> None:
        """Start from the policy's weights."""
        self._policy, self._saves = policy, settings.save
        self._weights = None if settings.decay is None else FollowingWeights(policy, 1 - settings.decay)

    def update(self) -> None:
        """Update the average after a step."""
        if self._weights is not None:
            self._weights.update()

    def evaluated(self) -> AbstractContextManager[None]:
        """Use the average, if there is one, in place of the policy's weights within the context."""
        return nullcontext() if self._weights is None else self._weights.in_place()

    def saved(self) -> AbstractContextManager[None]:
        """Do the same for the `model/` of a checkpoint, if `ema.save`."""
        return self.evaluated() if self._saves else nullcontext()

    def shards(self) -> dict[str, dict[str, Tensor]]:
        """Return what resuming needs besides `model/`: the average and, with `ema.save`, the policy's own weights.

        These are the live tensors: loading into them changes the weights.
        """
        if self._weights is None:
            return {}
        own = {name: one.detach() for name, one in self._policy.named_parameters() if one.requires_grad}
        return {"ema": self._weights.values, **({"weights": own} if self._saves else {})}
