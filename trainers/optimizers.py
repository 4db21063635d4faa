"""The optimizer by its name in `torch.optim`, and the learning rate as a function of the update."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable

import torch
from torch import nn

from config.errors import UserError
from config.settings import TrainConfig

# Optimizers with a fused step on CPU and, in every supported torch, on CUDA. RMSprop, the DPO repo's default, has none.
FUSED = ("Adam", "AdamW", "SGD")


def optimizer_names() -> list[str]:
    """The classes of `torch.optim` that step once per gradient (LBFGS wants to evaluate the loss by itself)."""
    classes = inspect.getmembers(torch.optim, inspect.isclass)
    return [
        name
        for name, kind in classes
        if issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
    ]


def build_optimizer(parameters: Iterable[nn.Parameter], settings: TrainConfig) -> torch.optim.Optimizer:
    """`optimizer`, `lr` and `optimizer_args` of the settings, over these parameters; fused where there is a fused one.

    Raises:
        UserError: for a name that `torch.optim` lacks (the nearest is suggested), or arguments that it refuses.
    """
    names = optimizer_names()
    if settings.optimizer not in names:
        near = difflib.get_close_matches(settings.optimizer, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"optimizer={settings.optimizer} is not in torch.optim; {hint}It has {', '.join(names)}.")
    arguments = dict(settings.optimizer_args)
    if settings.optimizer in FUSED and not {"fused", "foreach", "differentiable"} & arguments.keys():
        arguments["fused"] = True
    kind = getattr(torch.optim, settings.optimizer)  # a name of the list above
    try:
        return kind(parameters, lr=settings.lr, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optimizer={settings.optimizer} refuses lr={settings.lr} optimizer_args={dict(settings.optimizer_args)}: "
            f"{error}"
        ) from error


def learning_rate(update: int, num_updates: int, settings: TrainConfig) -> float:
    """The learning rate of one update, counted from 0, of a run of `num_updates`.

    It rises as (update + 1) / (warm-up + 1), the DPO repo's way, then stays, or falls to 0 at the end of the run as a
    line or half a cosine. A pure function, so that a resumed run has nothing to restore.
    """
    warmup = settings.warmup_steps
    if settings.warmup_ratio is not None:
        warmup = math.ceil(settings.warmup_ratio * num_updates)
    if update < warmup:
        return settings.lr * (update + 1) / (warmup + 1)
    progress = (update - warmup) / max(1, num_updates - warmup)
    if settings.lr_scheduler == "linear":
        return settings.lr * max(0.0, 1 - progress)
    if settings.lr_scheduler == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr
