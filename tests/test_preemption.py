"""Requests to stop, and processes that die: what is left is whole, and the same command ends bit-equal."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import ROOT, metrics, without_times
from tests.ranks import Ranks, run_ranks
from tests.test_parallel import settings_of, train
from trainers import trainer
from trainers.distributed.preemption import PREEMPTED_STATUS, StopRequest
from trainers.run import checkpoint

SAVING = checkpoint.CheckpointSettings(every_examples=10, keep_last=2)


def settings_with_saves():
    """An epoch of 10 steps and three more."""
    return settings_of("sft", 2, 2, 1, checkpoint=SAVING, eval_every=16, n_examples=61)


def final(run_path: Path) -> bytes:
    return (run_path / "LATEST" / "model" / "model.safetensors").read_bytes()


def same_run(one: Path, other: Path) -> bool:
    """Bit-equal weights, and the same rows of metrics but for the clock's."""
    assert without_times(metrics(one)) == without_times(metrics(other))
    return final(one) == final(other)


MOMENTS = {
    "first evaluation": (trainer.Trainer, "_evaluation_means", 1),
    "step": (trainer.Trainer, "train_step", 4),
    "evaluation": (trainer.Trainer, "_evaluation_means", 2),
    "save": (checkpoint.CheckpointWriter, "save", 1),
    "last evaluation": (trainer.Trainer, "_evaluation_means", 5),
}


def train_with_signal(layout, folder, run_name, settings, moment, number, rank):
    """A run in which one process gets the signal on entering the n-th call of a function."""
    owner, name, calls = MOMENTS[moment]
    original, count = getattr(owner, name), [0]

    def signalled(*args, **kwargs):
        count[0] += 1
        if count[0] == calls and layout.rank == rank:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, signalled)
    train(layout, folder, run_name, settings)
    (folder / "not stopped").touch()


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The run that nothing stops."""
    folder = tmp_path_factory.mktemp("straight")
    settings = settings_with_saves()
    run_ranks(train, 2, settings, folder, "run", settings)
    return folder / "run"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(tmp_path, straight, moment):
    settings = settings_with_saves()
    number, rank = {"step": (signal.SIGTERM, 1), "evaluation": (signal.SIGINT, 0)}.get(moment, (signal.SIGUSR1, 0))
    arguments = (tmp_path, "run", settings, moment, number, rank)
    assert Ranks(train_with_signal, 2, settings, *arguments).join() == [PREEMPTED_STATUS] * 2
    assert not (tmp_path / "not stopped").exists()
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("*")]
    assert all(name.startswith("step-") for name in saved)
    assert bool(saved) == (moment != "first evaluation")  # a clean start, or a checkpoint
    if moment == "step":
        assert "step-20" in saved  # the step in which the signal came, the fourth of 5 rows, was finished
    run_ranks(train, 2, settings, tmp_path, "run", settings)
    assert same_run(tmp_path / "run", straight)


def test_a_second_ctrl_c_ends_the_process_at_once_and_no_other_signal_does():
    code = (
        "import os, signal, time\n"
        "from trainers.distributed.preemption import StopRequest\n"
        "stop = StopRequest()\n"
        "with stop.on_signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)\n"  # one request, twice
        "    assert stop\n"
        "    time.sleep(1.2)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('and here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert done.stdout == "still here\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_interpreter_ends_changes_no_status(number):
    """Handlers are gone by then: a finished run that Slurm signals at its time limit would have failed."""
    code = (
        "import os, signal\n"
        "from trainers.distributed.preemption import StopRequest, exit_on_signals\n"
        "class Last:\n"
        f"    def __del__(self, kill=os.kill, me=os.getpid()): kill(me, {int(number)})\n"
        "exit_on_signals()\n"
        "with StopRequest().on_signals():\n"
        "    pass\n"
        "import builtins; builtins.last = Last()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_who_leaves_hears_nothing_more():
    stop, before = StopRequest(), signal.getsignal(signal.SIGTERM)
    try:
        with stop.on_signals():
            stop.close()
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # also behind the context: the others end still
    finally:
        for number, handler in ((signal.SIGTERM, before), (signal.SIGUSR1, signal.SIG_DFL)):
            signal.signal(number, handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_programs_with_ledgers_end_with_the_status_that_asks_for_another_start():
    code = (
        "import os, signal\n"
        "from trainers.distributed.preemption import exit_behind_ledgers\n"
        "exit_behind_ledgers()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"  # Ctrl-C has its own answer there
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == PREEMPTED_STATUS
    assert "SIGUSR1 ends it; rerun the same command to continue after the last row" in done.stderr


def test_signals_can_be_answered_before_torch_is_imported():
    code = "import sys, trainers.distributed.preemption; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_ctrl_c_is_answered_and_ignored_where_the_shell_has_it_so(capfd):
    stop = StopRequest()
    with stop.on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
    assert "with a checkpoint; Ctrl-C again ends at once" in capfd.readouterr().err
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a job behind `&` in a script
    try:
        with StopRequest().on_signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().on_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("who", ["one", "all"])
def test_killed_at_random_moments(tmp_path, straight, who):
    """SIGKILL with asynchronous saves under way; `benchmarks/kill_and_resume.py` does it through the command line."""
    draw, settings, killed = random.Random(who), settings_with_saves(), 0
    for _ in range(4):
        ranks = Ranks(train, 2, settings, tmp_path, "run", settings)
        time.sleep(draw.uniform(0.4, 2.2))
        victims = ranks.processes if who == "all" else [draw.choice(ranks.processes)]
        alive = all(process.is_alive() for process in ranks.processes)
        for process in victims:
            process.kill()
        statuses = ranks.join()
        killed += alive
        assert not alive or -signal.SIGKILL in statuses
    run_ranks(train, 2, settings, tmp_path, "run", settings)
    assert same_run(tmp_path / "run", straight)
    assert killed, "every run was over before it could be killed"
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2  # nothing half-written stays
