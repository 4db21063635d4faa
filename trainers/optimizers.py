"""The optimizer by name, the parameters that it updates and decays, and the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from config.errors import UserError
from config.names import TORCHAO_OPTIMIZERS
from config.settings import TrainConfig
from trainers.distributed.sharding import local_part

# Optimizers with a fused step on CPU and, in every supported torch, on CUDA; SGD's does not accept sharded weights.
FUSED = ("Adam", "AdamW", "SGD")
CHOOSE_THE_STEP = {"fused", "foreach", "capturable", "differentiable"}  # arguments that select an implementation


class RMSprop(torch.optim.RMSprop):
    """torch's RMSprop, the DPO repo's default, with a fused step for a GPU, which torch lacks.

    A step reads parameter, gradient and average and writes parameter and average: 20 bytes per float32 parameter.
    torch's `foreach` step makes five passes: 56 bytes, and 4 more in a temporary. The state is the same as torch's.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, alpha: float = 0.99, eps: float = 1e-8) -> None:
        """Take only the arguments that the fused step supports: no momentum, centering or weight decay."""
        super().__init__(parameters, lr=lr, alpha=alpha, eps=eps)
        self._one_pass = torch.compile(rmsprop_pass, dynamic=True, fullgraph=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody here evaluates the loss again
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            # A tensor, as a number would be compiled in; and one for all parameters, as each costs a kernel launch.
            lr = torch.full((), group["lr"], device=local_part(group["params"][0]).device)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["square_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["step"] += 1
                target, gradient, average = map(local_part, (parameter, parameter.grad, state["square_avg"]))
                self._one_pass(target, gradient, average, lr, group["alpha"], group["eps"])


def rmsprop_pass(parameter: Tensor, gradient: Tensor, average: Tensor, lr: Tensor, alpha: float, eps: float) -> None:
    """Update a parameter and its average of squared gradients (both of its shape, in place), as `torch.optim` does."""
    average.mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
    parameter.sub_(lr * gradient / (average.sqrt() + eps))


class TwoOptimizers(torch.optim.Optimizer):
    """Two optimizers over different parameters, combined into one with the groups and state of both.

    Checkpoints, schedules and layouts see one optimizer; `part` of a group tells which of the two steps it.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        """Take both optimizers, each over its own parameters."""
        groups = [{**group, "part": number} for number, part in enumerate(parts) for group in part.param_groups]
        super().__init__(groups, {})
        self._parts = parts

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody here evaluates the loss again
        """Let each optimizer step its own groups."""
        for number, part in enumerate(self._parts):
            part.param_groups = [group for group in self.param_groups if group["part"] == number]
            part.state = self.state  # set every time, because loading a checkpoint replaces groups and state
            part.step()


def build_optimizer(
    parameters: Iterable[nn.Parameter], settings: TrainConfig, tables: Collection[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """Return the configured optimizer over these parameters, with a fused step if there is one.

    Arguments that select torch's implementation (`optimizer_args.foreach=true`) take precedence.

    Args:
        parameters: To be trained.
        settings: Names and arguments, checked (`config/checks_train.py`).
        tables: Those matrices that hold a row a token (embeddings, head), which Muon leaves to its fallback: what it
            does to a matrix as a whole makes no sense of them.

    Raises:
        UserError: for arguments that it refuses, or parameters that no optimizer steps.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if settings.optimizer != "Muon":
        return _one_optimizer(settings.optimizer, parameters, settings, settings.optimizer_args)
    left = {id(parameter) for parameter in tables} | {id(one) for one in parameters if one.ndim != 2}
    others = [parameter for parameter in parameters if id(parameter) in left]
    muon = _one_optimizer("Muon", [one for one in parameters if id(one) not in left], settings, settings.optimizer_args)
    if not others:
        return muon
    if settings.fallback_optimizer is None:
        raise UserError("optimizer=Muon only updates matrices; write fallback_optimizer=AdamW for the other parameters")
    return TwoOptimizers(muon, _one_optimizer(settings.fallback_optimizer, others, settings, settings.fallback_args))


def tables_of(policy: Any) -> list[nn.Parameter]:
    """Return the matrices of a causal LM with one row per token: input and output embeddings."""
    return [module.weight for module in (policy.get_input_embeddings(), policy.get_output_embeddings())]


def _one_optimizer(
    name: str, parameters: list[nn.Parameter], settings: TrainConfig, given: Mapping[str, Any]
) -> torch.optim.Optimizer:
    arguments = dict(given)
    kind = getattr(import_module("torchao.optim") if name in TORCHAO_OPTIMIZERS else torch.optim, name)
    is_whole = local_part(parameters[0]) is parameters[0]
    if name in FUSED and (is_whole or name != "SGD") and not CHOOSE_THE_STEP & arguments.keys():
        arguments["fused"] = True
    elif name == "RMSprop" and arguments.keys() <= {"alpha", "eps"} and parameters[0].is_cuda:
        kind = RMSprop
    try:
        return kind(decay_groups(parameters, settings.weight_decay_on), lr=settings.lr, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer={name} rejects lr={settings.lr} and arguments {dict(given)}: {error}") from error


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups; fill it in place if it is a tensor, which torchao's compiled step reads."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr


def decay_groups(parameters: list[nn.Parameter], weight_decay_on: str) -> list[Any]:
    """Return the parameters, or two groups of them: matrices, and vectors without weight decay."""
    if weight_decay_on == "all":
        return parameters
    groups = [[one for one in parameters if one.ndim >= 2], [one for one in parameters if one.ndim < 2]]
    return [group for group in ({"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}) if group["params"]]


def num_warmup_steps(num_updates: int, settings: TrainConfig) -> int:
    """Return the number of warm-up steps in a run of `num_updates`."""
    if settings.warmup_ratio is not None:
        return math.ceil(settings.warmup_ratio * num_updates)
    return settings.warmup_steps


def warmup_note(num_updates: int, settings: TrainConfig) -> str:
    """Return a sentence if the run ends during its warm-up, otherwise ""."""
    warmup = num_warmup_steps(num_updates, settings)
    if not 0 < num_updates <= warmup:
        return ""
    last = learning_rate(num_updates - 1, num_updates, settings) / settings.lr
    return (
        f"the warm-up of {warmup} steps is not over when this run ends, after {num_updates}: its last learning rate is "
        f"{last:.0%} of lr={settings.lr}. Write warmup_steps=N with a smaller N, or warmup_ratio=0.1"
    )


def learning_rate(update: int, num_updates: int, settings: TrainConfig) -> float:
    """Return the learning rate of update number `update`, counted from 0, in a run of `num_updates`.

    It rises as (update + 1) / (warm-up + 1), as in the DPO repo. Then it is constant, or falls to 0 at the end of the
    run, linearly or as half a cosine; wsd (warm-up, stable, decay) is constant until a linear fall to 0 in the last
    `decay_ratio` of all updates, which also caps a long warm-up. A pure function: resuming has nothing to restore.
    """
    warmup = num_warmup_steps(num_updates, settings)
    warmed = settings.lr * min(1.0, (update + 1) / (warmup + 1))
    if settings.lr_scheduler == "wsd":
        return min(warmed, settings.lr * (num_updates - update) / (settings.decay_ratio * num_updates))
    if update < warmup:
        return warmed
    progress = (update - warmup) / max(1, num_updates - warmup)
    if settings.lr_scheduler == "linear":
        return settings.lr * max(0.0, 1 - progress)
    if settings.lr_scheduler == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return settings.lr
