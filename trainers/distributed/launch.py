"""The processes of a run: how they start and form a process group.

There is always a process group, even for one process, so that no other code depends on the number of processes. How a
model is distributed over the processes is in `trainers/distributed/parallelize.py`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from config.errors import UserError
from config.settings import TrainConfig
from trainers.distributed.layout import Layout
from trainers.distributed.preemption import PREEMPTED_STATUS, Preempted, StopRequest
from trainers.distributed.spawn import Place, start_processes


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for `device=auto|cpu|cuda|cuda:1` on this machine, and make a GPU the current device.

    Raises:
        UserError: if CUDA is requested but missing, or there are fewer GPUs than processes on this machine.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device={name}: torch {torch.__version__} sees no GPU here; use device=cpu or device=auto.")
    device = torch.device("cuda" if name == "auto" else name)
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    if (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"there is no {device} for process {local_rank} of this machine, which has {torch.cuda.device_count()} "
            "GPUs: set trainer.num_processes to that number, or device=cpu."
        )
    torch.cuda.set_device(device)  # nccl, and the saved random state, use the current device
    return device


def launch(worker: Callable[[Layout], None], settings: TrainConfig) -> None:
    """Run `worker(layout)` in the processes of the run, each inside a process group.

    `trainer=BasicTrainer` uses this process only. `trainer=FSDPTrainer` joins the processes of torchrun or srun if one
    of these started this process; otherwise it starts `trainer.num_processes` processes (`worker` is pickled).

    Raises:
        UserError: BasicTrainer under a launcher of several processes, or settings that do not fit their number.
        SystemExit: with PREEMPTED_STATUS after a request to stop, or with the status of a process that crashed.
    """
    try:
        if settings.trainer.name == "BasicTrainer":
            _refuse_launchers()
            work_in_group(Place(0, 1, 0), StopRequest(), worker=worker, settings=settings, address=None)
            return
        place = launcher_place(os.environ)
        if place is not None:
            work_in_group(place, StopRequest(), worker=worker, settings=settings, address="env")
            return
        count = default_num_processes(settings)
        store = local_store(settings)
        print(f"FSDPTrainer: {count} processes on this machine", file=sys.stderr, flush=True)
        work = partial(work_in_group, worker=worker, settings=settings, address=store.port)
        start_processes(work, count)
    except Preempted as stopped:
        if str(stopped):
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(PREEMPTED_STATUS)


def default_num_processes(settings: TrainConfig) -> int:
    """Return `trainer.num_processes`; if null, one per GPU, or two on a CPU (one if it has a single core)."""
    if settings.trainer.num_processes is not None:
        return settings.trainer.num_processes
    if settings.device == "cpu" or not torch.cuda.is_available():
        return min(2, os.cpu_count() or 1)
    return torch.cuda.device_count()


def launcher_place(environment: Mapping[str, str]) -> Place | None:
    """Return the place that torchrun, or an `srun` step of several tasks, gave this process; None if neither did."""
    if "WORLD_SIZE" in environment and "RANK" in environment:
        rank = int(environment["RANK"])
        return Place(rank, int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", rank)))
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise UserError(
                    f"srun started {size} tasks (SLURM_STEP_NUM_TASKS), but {name} is not set; export MASTER_ADDR (the "
                    "first node's name) and MASTER_PORT before srun, as scripts/slurm/train.sbatch does."
                )
        return Place(rank, size, int(environment["SLURM_LOCALID"]))
    return None


def _refuse_launchers() -> None:
    # The process count of torchrun, or of one `srun` step (each task of an array job is a step of one process).
    for variable in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if int(os.environ.get(variable, "1")) > 1:
            raise UserError(
                f"trainer=BasicTrainer is one process, but a launcher started {os.environ[variable]} of them "
                f"({variable}={os.environ[variable]}); use trainer=FSDPTrainer, or start one process with `python "
                "train.py ...` or `srun --ntasks=1`."
            )


def local_store(settings: TrainConfig) -> dist.TCPStore:
    """Open the store at which this machine's processes meet; without `fsdp_port`, the system chooses a free port."""
    port = settings.fsdp_port or 0
    try:
        return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    except (RuntimeError, ValueError) as error:  # DistNetworkError is a RuntimeError
        raise _port_taken(f"fsdp_port={port}", "leave fsdp_port out to get a free port", error) from error


def _port_taken(what: str, instead: str, error: BaseException) -> UserError:
    return UserError(f"{what} cannot be used ({str(error).splitlines()[0]}); another program may use it: {instead}.")


def work_in_group(
    place: Place, stop: StopRequest, *, worker: Callable[[Layout], None], settings: TrainConfig,
    address: int | str | None,
) -> None:  # fmt: skip
    """Join the process group and work.

    `address` is the port of the launcher's store on this machine, or "env" for MASTER_ADDR and MASTER_PORT. None means
    a single process, which uses no port, so that runs that start at the same time cannot conflict.
    """
    check_numbers(settings, place.world_size)
    device = pick_device(settings.device, place.local_rank)
    torch.set_float32_matmul_precision("high" if settings.tf32 and device.type == "cuda" else "highest")
    if address is None:
        store: dist.Store = dist.HashStore()
    elif address == "env":
        os.environ |= {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size)}
        try:
            store = next(iter(dist.rendezvous("env://")))[0]
        except dist.DistNetworkError as error:
            here = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
            raise _port_taken(here, "export another MASTER_PORT", error) from error
    else:
        store = dist.TCPStore("127.0.0.1", int(address), is_master=False)
    # gloo in addition to nccl, to reduce counts and other small host values without touching the GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    group = dist.PrefixStore("group", store)
    with stop.on_signals():
        dist.init_process_group(backend, store=group, rank=place.rank, world_size=place.world_size)
        try:
            layout = Layout(
                rank=place.rank,
                world_size=place.world_size,
                device=device,
                stop=stop,
                mesh=_mesh(settings, place.world_size, device),
                store=dist.PrefixStore("layout", store),
            )
            try:
                worker(layout)
            except Preempted:  # raised in all processes
                # A launcher kills the others once one exits: wait until rank 0 has closed its logs, then exit together.
                layout.on_main(stop.close)
                stop.close()
                raise
        finally:
            dist.destroy_process_group()


def check_numbers(settings: TrainConfig, world_size: int) -> None:
    """Raise a UserError for settings that do not fit the number of processes."""
    replicas = settings.trainer.num_replicas
    if world_size % replicas:
        raise UserError(
            f"trainer.num_replicas={replicas} does not divide the {world_size} processes of this run: each replica is "
            f"sharded over world size / num_replicas processes; use one of {_divisors(world_size)}."
        )
    for name, rows in (("batch_size", settings.batch_size), ("eval_batch_size", settings.eval_batch_size)):
        if rows < world_size:
            raise UserError(
                f"{name}={rows} is less than the {world_size} processes of this run: some would never have a row. Use "
                f"{name}={world_size} or more, or trainer.num_processes={rows} or fewer."
            )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _mesh(settings: TrainConfig, world_size: int, device: torch.device) -> DeviceMesh | None:
    # Why not always? In one process FSDP shards nothing, but copies every parameter and gradient. It is only used there
    # for its other features: another compute dtype, or CPU offload.
    fsdp_serves = world_size > 1 or settings.model.fsdp_policy_mp is not None or settings.trainer.cpu_offload
    if settings.trainer.name == "BasicTrainer" or not fsdp_serves:
        return None
    replicas = settings.trainer.num_replicas
    if replicas == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (replicas, world_size // replicas), mesh_dim_names=("replicate", "shard"))
