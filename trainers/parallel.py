"""How a run is laid out over processes and devices.

A process group always exists, of one process as of many, so that nothing else asks how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config.errors import UserError
from config.settings import TrainConfig


@dataclass(frozen=True)
class Layout:
    """This process's place in the run."""

    rank: int
    world_size: int
    device: torch.device


def pick_device(name: str) -> torch.device:
    """The device that `device=auto|cpu|cuda|cuda:1` means on this machine; a GPU becomes the current one.

    Raises:
        UserError: if CUDA is asked for and there is none.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device={name}: torch {torch.__version__} sees no GPU here; use device=cpu or device=auto.")
    device = torch.device("cuda" if name == "auto" else name)
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)  # the random state that is saved, and nccl, are of the current one
    return device


def launch(worker: Callable[[Layout], None], settings: TrainConfig) -> None:
    """Runs `worker(layout)` inside a process group.

    Raises:
        UserError: for a trainer that this version has not, or one process's trainer under a launcher of several.
    """
    if settings.trainer.name != "BasicTrainer":
        raise UserError(
            f"trainer={settings.trainer.name}: this version trains in one process only; use trainer=BasicTrainer."
        )
    # A launcher's own count: torchrun's, or that of one `srun` step (an array job's tasks are steps of one).
    for variable in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if int(os.environ.get(variable, "1")) > 1:
            raise UserError(
                f"trainer=BasicTrainer is one process, but a launcher started {os.environ[variable]} of them "
                f"({variable}={os.environ[variable]}); start it with `python train.py ...`, or `srun --ntasks=1`."
            )
    device = pick_device(settings.device)
    # gloo beside nccl: counts and other small things of the host are reduced without touching the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # A store in memory: one process needs no port, so that runs started at once cannot take each other's.
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        worker(Layout(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device))
    finally:
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of every process's `values` (any shape), in place."""
    dist.all_reduce(values)
    return values


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients down to a global L2 norm of at most `max_norm`; returns the norm before, a scalar."""
    return nn.utils.clip_grad_norm_(list(parameters), max_norm)
