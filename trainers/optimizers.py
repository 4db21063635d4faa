"""The optimizer by its name in `torch.optim`, and the learning rate as a function of the update."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from config.errors import UserError
from config.settings import TrainConfig
from trainers.distributed.sharding import local_part

# Optimizers with a fused step on CPU and, in every supported torch, on CUDA.
FUSED = ("Adam", "AdamW", "SGD")
CHOOSE_THE_STEP = {"fused", "foreach", "capturable", "differentiable"}  # arguments that name an implementation


class RMSprop(torch.optim.RMSprop):
    """torch's RMSprop, the DPO repo's default, with a step of one pass: for a GPU, where torch has no fused one.

    A step reads parameter, gradient and average and writes parameter and average: 20 bytes a float32 parameter. torch's
    `foreach` step goes over them five times: 56 bytes, and 4 more are held by a temporary. The state is torch's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, alpha: float = 0.99, eps: float = 1e-8) -> None:
        """Take only the arguments that the pass knows; without momentum, centering and weight decay."""
        super().__init__(parameters, lr=lr, alpha=alpha, eps=eps)
        self._one_pass = torch.compile(rmsprop_pass, dynamic=True, fullgraph=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody here evaluates the loss again
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["square_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["step"] += 1
                target, gradient, average = map(local_part, (parameter, parameter.grad, state["square_avg"]))
                # A tensor: a number would be compiled in, and the learning rate changes.
                lr = torch.full((), group["lr"], device=target.device)
                self._one_pass(target, gradient, average, lr, group["alpha"], group["eps"])


def rmsprop_pass(parameter: Tensor, gradient: Tensor, average: Tensor, lr: Tensor, alpha: float, eps: float) -> None:
    """Update a parameter and its average of squared gradients (both of its shape, in place), as `torch.optim` does."""
    average.mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
    parameter.sub_(lr * gradient / (average.sqrt() + eps))


def optimizer_names() -> list[str]:
    """Return the classes of `torch.optim` that step once per gradient (LBFGS wants to evaluate the loss by itself)."""
    classes = inspect.getmembers(torch.optim, inspect.isclass)
    return [
        name
        for name, kind in classes
        if issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
    ]


def build_optimizer(parameters: Iterable[nn.Parameter], settings: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the settings over these parameters, with a step of one pass where there is one.

    Arguments that choose torch's implementation (`optimizer_args.foreach=true`) are obeyed.

    Raises:
        UserError: for a name that `torch.optim` lacks (the nearest is suggested), or arguments that it refuses.
    """
    parameters = list(parameters)
    names = optimizer_names()
    if settings.optimizer not in names:
        near = difflib.get_close_matches(settings.optimizer, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"optimizer={settings.optimizer} is not in torch.optim; {hint}It has {', '.join(names)}.")
    arguments = dict(settings.optimizer_args)
    kind = getattr(torch.optim, settings.optimizer)  # a name of the list above
    if settings.optimizer in FUSED and not CHOOSE_THE_STEP & arguments.keys():
        arguments["fused"] = True
    elif settings.optimizer == "RMSprop" and arguments.keys() <= {"alpha", "eps"} and parameters[0].is_cuda:
        kind = RMSprop
    try:
        return kind(parameters, lr=settings.lr, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"optimizer={settings.optimizer} refuses lr={settings.lr} optimizer_args={dict(settings.optimizer_args)}: "
            f"{error}"
        ) from error


def num_warmup_steps(num_updates: int, settings: TrainConfig) -> int:
    """Count the steps of the warm-up of a run of `num_updates`."""
    if settings.warmup_ratio is not None:
        return math.ceil(settings.warmup_ratio * num_updates)
    return settings.warmup_steps


def warmup_note(num_updates: int, settings: TrainConfig) -> str:
    """Return a sentence for a run that ends in its warm-up; empty for others."""
    warmup = num_warmup_steps(num_updates, settings)
    if not 0 < num_updates <= warmup:
        return ""
    last = learning_rate(num_updates - 1, num_updates, settings) / settings.lr
    return (
        f"the warm-up of {warmup} steps is not over when this run ends, after {num_updates}: its last learning rate is "
        f"{last:.0%} of lr={settings.lr}. Write warmup_steps=N with a smaller N, or warmup_ratio=0.1"
    )


def learning_rate(update: int, num_updates: int, settings: TrainConfig) -> float:
    """Return the learning rate of one update, counted from 0, of a run of `num_updates`.

    It rises as (update + 1) / (warm-up + 1), the DPO repo's way, then stays, or falls to 0 at the end of the run as a
    line or half a cosine. A pure function, so that a resumed run has nothing to restore.
    """
    warmup = num_warmup_steps(num_updates, settings)
    if update < warmup:
        return settings.lr * (update + 1) / (warmup + 1)
    progress = (update - warmup) / max(1, num_updates - warmup)
    if settings.lr_scheduler == "linear":
        return settings.lr * max(0.0, 1 - progress)
    if settings.lr_scheduler == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr
