"""A second copy of a model's weights that follows them: their moving average, or a reference that is renewed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from config.settings import EMASettings
from trainers.distributed.sharding import local_part, reshard


class FollowingWeights:
    """Weights that move towards a model's own by `rate` x (own - these) at each update; sharded as the model is.

    They are float32, or wider where the model is: an average of 16-bit weights would round small updates away. Weights
    that are not trained have no copy.

    Attributes:
        values: Name of a parameter -> its copy, a tensor or DTensor. A checkpoint may read them and write into them.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        """Begin as the model's weights, which are laid out and whole or sharded."""
        self._model, self._rate = model, rate
        self._own = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self.values: dict[str, Tensor] = {
            name: one.detach().to(torch.promote_types(one.dtype, torch.float32), copy=True)
            for name, one in self._own.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Move; the model is between two steps."""
        for name, value in self.values.items():
            value = local_part(value)
            value.lerp_(local_part(self._own[name]).to(value.dtype), self._rate)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run the model with these weights. Its own are kept beside, in their dtype: the room that gradients take."""
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
        """Begin at the policy's weights."""
        self._policy, self._saves = policy, settings.save
        self._weights = None if settings.decay is None else FollowingWeights(policy, 1 - settings.decay)

    def update(self) -> None:
        """Take in the policy's weights, after a step."""
        if self._weights is not None:
            self._weights.update()

    def evaluated(self) -> AbstractContextManager[None]:
        """Put the average in the place of the policy's weights, where there is one."""
        return nullcontext() if self._weights is None else self._weights.in_place()

    def saved(self) -> AbstractContextManager[None]:
        """Do so for what becomes `model/` of a checkpoint."""
        return self.evaluated() if self._saves else nullcontext()

    def shards(self) -> dict[str, dict[str, Tensor]]:
        """Return what a run needs to go on, beside `model/`: the average and, if it is there, the policy's own weights.

        The tensors are those in use: what is written into them counts.
        """
        if self._weights is None:
            return {}
        own = {name: one.detach() for name, one in self._policy.named_parameters() if one.requires_grad}
        return {"ema": self._weights.values, **({"weights": own} if self._saves else {})}
