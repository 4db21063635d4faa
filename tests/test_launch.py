"""`python train.py trainer=FSDPTrainer` as typed: its own processes, torchrun's, signals, deaths, mistakes."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from config.errors import SaidElsewhere, UserError
from config.settings import TrainerSettings
from tests.commands import ROOT, Process, metrics, run, start, without_times, write_pairs
from tests.ranks import Ranks
from tests.tiny_runs import tiny_settings
from tests.warm import fork_server
from trainers.distributed.launch import check_numbers, default_num_processes, launch, launcher_place
from trainers.distributed.layout import (
    Layout,
    gather_objects,
    share_from_main,
    sum_over_processes,
)
from trainers.distributed.preemption import PREEMPTED_STATUS
from trainers.distributed.spawn import Place, start_processes
from trainers.run.run_dir import RunDir


@pytest.fixture
def command(tmp_path, tiny_model_folder) -> list[str]:
    """SFT of a tiny model on 60 rows, 2 processes on the CPU."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", num_rows=60)
    return [
        "loss=sft", "model=blank_model", f"model.name_or_path={tiny_model_folder}", f"datasets.si.path={pairs}",
        "batch_size=4", "eval_batch_size=4", "eval_every=24", "lr=1e-3", "optimizer=AdamW", "wandb.enabled=false",
        "minimum_log_interval_secs=0", "trainer=FSDPTrainer", "trainer.num_processes=2", "checkpoint.keep_last=3",
    ]  # fmt: skip


def final(run_path: Path) -> bytes:
    return (run_path / "LATEST" / "model" / "model.safetensors").read_bytes()


def test_one_process_its_own_and_torchruns_train_the_same(command, tmp_path):
    """Losses to 1e-5, and the same samples: under torchrun, from its own launcher, and in one process."""
    sampled = ["sample_during_eval=true", "n_eval_model_samples=3", "max_new_tokens=12", "n_epochs=1"]
    out, err = run([*command, *sampled, "exp_name=own"], tmp_path, fresh=True)  # its processes are spawned
    assert "FSDPTrainer: 2 processes" in err
    assert out.count("run directory") == out.count("next:") == 1
    alone = [argument for argument in command if not argument.startswith("trainer")]
    run([*alone, *sampled, "exp_name=one"], tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *command, *sampled, "exp_name=torchrun"],
        cwd=tmp_path, check=True, capture_output=True, env={**os.environ, "WANDB_MODE": "disabled"},
    )  # fmt: skip
    one, own, joined = (metrics(tmp_path / "runs" / name) for name in ("one", "own", "torchrun"))
    assert without_times(own) == without_times(joined)
    for row, expected in zip(own, one, strict=True):
        for name in ("loss/train", "loss/eval"):
            assert row.get(name) == (pytest.approx(expected[name], abs=1e-5) if name in expected else None)
    samples = {name: (tmp_path / "runs" / name / "samples.jsonl").read_text() for name in ("one", "own", "torchrun")}
    assert samples["one"] == samples["own"] == samples["torchrun"]
    assert samples["one"].count("\n") == 3 * sum("loss/eval" in row for row in one)


def wait_for(path: Path, process: Process) -> None:
    deadline = time.monotonic() + 1500
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists(), process.communicate()


def ranks_of(process: Process) -> list[int]:
    """The processes of the run in the order of their ranks."""
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_stopped_killed_and_finished_by_one_command(command, tmp_path):
    """SIGTERM to the launcher; then SIGKILL of one of its processes; then the command once more."""
    command = [*command, "n_epochs=4", "exp_name=run", "checkpoint.every_examples=40"]
    process = start(command, tmp_path)
    wait_for(tmp_path / "runs" / "run" / "LATEST", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == PREEMPTED_STATUS, err
    assert "stopped as asked after" in err
    assert "Traceback" not in err
    stopped_at = metrics(tmp_path / "runs" / "run")[-1]["counters/examples"]
    assert (tmp_path / "runs" / "run" / "LATEST").resolve().name == f"step-{stopped_at}"

    process = start(command, tmp_path)
    deadline = time.monotonic() + 1500
    while time.monotonic() < deadline and metrics(tmp_path / "runs" / "run")[-1]["counters/examples"] == stopped_at:
        time.sleep(0.05)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=600)
    assert time.monotonic() - killed < 600  # not the half hour of the collectives
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 1 of 2" in err
    assert "killed by SIGKILL" in err
    assert "Traceback" not in err  # rank 0 only lost its peer

    run(command, tmp_path)
    run([*command[:-2], "exp_name=straight", "checkpoint.every_examples=40"], tmp_path)
    assert final(tmp_path / "runs" / "run") == final(tmp_path / "runs" / "straight")
    assert without_times(metrics(tmp_path / "runs" / "run")) == without_times(metrics(tmp_path / "runs" / "straight"))


def test_a_signal_before_the_run_has_begun(command, tmp_path):
    process = start([*command, "exp_name=early"], tmp_path, fresh=True)
    time.sleep(1.0)  # torch is being imported
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == PREEMPTED_STATUS, err
    assert not list((tmp_path / "runs").glob("*/checkpoints/*"))


@pytest.fixture
def forked(monkeypatch):
    """`start_processes` with forks of the warm server: that its processes can be spawned, the commands above show."""
    server = fork_server()
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: server)


def crash_in_rank_1(place, stop, store_path):
    """Rank 0 waits for rank 1 in a collective; rank 1 has a defect."""
    store = dist.FileStore(store_path, place.world_size)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size)
    if place.rank == 1:
        raise RuntimeError("the defect of rank 1")
    dist.all_reduce(torch.zeros(1))


def error_in_every_rank(place, stop):
    if place.rank:
        raise SaidElsewhere("as rank 0 says")
    time.sleep(0.5)
    raise UserError("the message, once")


def test_the_process_that_failed_first_is_named_with_its_traceback(tmp_path, forked, capsys):
    with pytest.raises(SystemExit) as stopped:
        start_processes(partial(crash_in_rank_1, store_path=str(tmp_path / "store")), 2)
    assert stopped.value.code == 1
    err = capsys.readouterr().err
    assert "RuntimeError: the defect of rank 1" in err
    assert "rank 1 of 2 failed first" in err
    assert err.count("Traceback") == 1


def test_a_users_mistake_is_told_once(forked):
    with pytest.raises(UserError) as caught:
        start_processes(error_in_every_rank, 2)
    assert str(caught.value) == "the message, once"


def nothing(layout):
    """Joins the group and leaves."""


@pytest.mark.parametrize(
    ("changes", "replicas", "message"),
    [
        ({"batch_size": 1}, 1, "batch_size=1 is less than the 2 processes"),
        ({"eval_batch_size": 1}, 1, "eval_batch_size=1 is less than the 2 processes"),
        ({}, 3, "num_replicas=3 does not divide the 2 processes of this run.* use one of 1, 2"),
    ],
)
def test_numbers_that_only_the_processes_make_wrong(changes, replicas, message):
    settings = tiny_settings(**changes, trainer=TrainerSettings("FSDPTrainer", 2, replicas))
    with pytest.raises(UserError, match=message):
        check_numbers(settings, 2)


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = tiny_settings(trainer=TrainerSettings("FSDPTrainer", 2), fsdp_port=port)
        with pytest.raises(UserError, match=rf"fsdp_port={port} cannot be used .*leave fsdp_port out"):
            launch(nothing, settings)


def test_a_launchers_port_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"MASTER_PORT={port} cannot be used .*export another MASTER_PORT"):
            launch(nothing, tiny_settings(trainer=TrainerSettings("FSDPTrainer")))


def test_the_place_that_a_launcher_gives():
    assert launcher_place({}) is None
    assert launcher_place({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(3, 8, 1)
    slurm = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
    assert launcher_place({**slurm, "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}) == Place(2, 4, 0)
    assert launcher_place({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) is None
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        launcher_place(slurm)


def test_the_default_number_of_processes():
    settings = tiny_settings(trainer=TrainerSettings("FSDPTrainer"))
    assert default_num_processes(settings) == min(2, os.cpu_count() or 1)
    assert default_num_processes(replace(settings, trainer=TrainerSettings("FSDPTrainer", 7))) == 7


def fail_on_main(layout: Layout):
    """Rank 0's UserError reaches the others as one that they need not say."""

    def fail():
        raise UserError("no")

    if layout.is_main:
        with pytest.raises(UserError, match=r"^no$"):
            layout.on_main(fail)
    else:
        with pytest.raises(SaidElsewhere, match=r"^no$"):
            layout.on_main(fail)
    assert layout.on_main(lambda: layout.rank) == 0
    assert layout.main_first(lambda: layout.rank) == layout.rank


def test_what_rank_0_does_for_all():
    settings = tiny_settings(trainer=TrainerSettings("FSDPTrainer"))
    assert Ranks(fail_on_main, 2, settings).join() == [0, 0]


def test_two_jobs_in_one_run_directory(command, tmp_path):
    with RunDir.open(tmp_path / "runs" / "run", config={}, manifest={}):
        _, err = run([*command, "exp_name=run"], tmp_path, status=2)
    assert err.count(f"is in use by process {os.getpid()} on ") == 1
    assert "Traceback" not in err


def reduced_and_gathered(layout: Layout):
    """What every process has after each of the collectives."""
    ones = torch.ones(2) * (layout.rank + 1)
    assert sum_over_processes(ones.clone()).tolist() == [sum(range(1, layout.world_size + 1))] * 2
    assert gather_objects(layout.rank) == list(range(layout.world_size))
    flags = torch.tensor([layout.is_main, not layout.is_main])
    share_from_main(flags)
    assert flags.tolist() == [True, False]
    only = layout.main_only(lambda: object())  # that it cannot be pickled does not matter
    assert (only is not None) == layout.is_main


def test_collectives_of_several_processes_and_of_one(monkeypatch):
    settings = tiny_settings(trainer=TrainerSettings("FSDPTrainer"))
    assert Ranks(reduced_and_gathered, 2, settings).join() == [0, 0]
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast"):
        monkeypatch.setattr(dist, name, None)  # one process makes no collective call, which a GPU would wait for
    launch(reduced_and_gathered, tiny_settings())
