"""Metric sums, the files they go to, and how wandb is chosen."""

import io
import json
import subprocess
import sys
import threading

import pytest
import torch

from config.errors import UserError
from config.settings import TrainConfig, WandbSettings
from tests.warm import ROOT
from trainers.distributed.launch import launch
from trainers.run.metrics import MetricSums
from trainers.run.metrics_log import MetricsLog, wandb_mode
from trainers.run.progress_line import ProgressLine, saying
from trainers.run.run_dir import RunDir


def in_group(function):
    """Runs a test body inside the process group that a run always has."""
    launch(lambda layout: function(), TrainConfig(exp_name="x", device="cpu"))


def test_every_example_of_the_interval_counts_once():
    def body():
        values = torch.tensor([1.0, 2.0, 30.0, 4.0, 5.0])
        sums = MetricSums()
        for part in (values[:1], values[1:4], values[4:]):  # of unequal size: a mean of means would be wrong
            sums.add("loss/train", part.sum(), len(part))
        sums.add("grad_norm", torch.tensor(7.0), 1.0)
        assert sums.means() == {"loss/train": values.double().mean().item(), "grad_norm": 7.0}
        assert sums.means() == {}

    in_group(body)


def test_sums_survive_json_bit_for_bit():
    def body():
        sums = MetricSums()
        for value in torch.rand(50, dtype=torch.float64):
            sums.add("a", value, 3.0)
        copy = MetricSums()
        copy.load(json.loads(json.dumps(sums.state())))
        assert copy.means() == sums.means()

    in_group(body)


def open_log(path, state=None, **changes):
    settings = TrainConfig(exp_name="x", wandb=WandbSettings(enabled=False), **changes)
    run = RunDir.open(path, config={"exp_name": "x"}, manifest={})
    return run, MetricsLog(run, settings, {}, state or {})


def test_a_resumed_log_drops_what_came_after_its_checkpoint(tmp_path):
    run, log = open_log(tmp_path)
    with run, log:
        log.write({"counters/examples": 1})
        log.write_samples([{"output": "a"}], 1)
        state = log.state()
        log.write({"counters/examples": 2})
        log.write_samples([{"output": "b"}], 2)
    with run.metrics.open("a") as file:
        file.write('{"counters/examples": 3, "loss/tra')  # torn by a kill
    run, log = open_log(tmp_path, json.loads(json.dumps(state)))
    with run, log:
        log.write({"counters/examples": 2})
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["counters/examples"] for row in rows] == [1, 2]
    samples = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert samples == [{"counters/examples": 1, "output": "a"}]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_log_that_is_not_what_the_checkpoint_has_seen_is_refused(tmp_path, damage):
    run, log = open_log(tmp_path)
    with run, log:
        log.write({"counters/examples": 1, "loss/train": 0.5})
        state = json.loads(json.dumps(log.state()))
    content = run.metrics.read_bytes()
    damages = {"flip": content.replace(b"0.5", b"0.7"), "cut": content[:-3], "empty": b"", "gone": None}
    run.metrics.unlink() if damages[damage] is None else run.metrics.write_bytes(damages[damage])
    if damage == "gone":
        run, log = open_log(tmp_path, state)
        with run, log:
            log.write({"counters/examples": 2})
        assert run.metrics.read_text() == '{"counters/examples": 2}\n'
        return
    with pytest.raises(UserError, match=r"metrics.jsonl: its first \d+ bytes differ from those .* delete it"):
        open_log(tmp_path, state)


def test_a_run_without_checkpoint_begins_its_log_anew(tmp_path):
    for _ in range(2):
        run, log = open_log(tmp_path)
        with run, log:
            log.write({"counters/examples": 0})
    assert len(run.metrics.read_text().splitlines()) == 1


def test_rows_are_in_the_file_at_once(tmp_path):
    run, log = open_log(tmp_path)
    with run, log:
        log.write({"counters/examples": 5, "loss/train": 0.5})
        assert json.loads(run.metrics.read_text())["loss/train"] == 0.5


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_wandb_is_offline_without_a_key_and_online_with_one(no_key, monkeypatch):
    assert wandb_mode(WandbSettings()) == "offline"
    no_key.write_text("machine api.wandb.ai login user password 0\n")
    assert wandb_mode(WandbSettings()) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode(WandbSettings()) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0")
    assert wandb_mode(WandbSettings()) == "online"


@pytest.mark.usefixtures("no_key")
def test_wandb_can_be_switched_off():
    assert wandb_mode(WandbSettings(mode="disabled")) == "disabled"
    assert wandb_mode(WandbSettings(enabled=False, mode="online")) == "disabled"
    assert wandb_mode(WandbSettings(mode="offline")) == "offline"


class FakeRun:
    """Stands for a wandb run: remembers what it is given."""

    id = "abc123"

    def __init__(self):
        self.rows, self.metrics = [], []

    def log(self, row):
        self.rows.append(row)

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def fake_wandb(no_key, monkeypatch):
    import wandb

    calls = []

    def init(**arguments):
        calls.append((arguments, FakeRun()))
        return calls[-1][1]

    monkeypatch.setattr(wandb, "init", init)
    return calls


def wandb_log(path, state=None, **changes):
    run = RunDir.open(path, config={}, manifest={})
    return run, MetricsLog(run, TrainConfig(exp_name="x", **changes), {"lr": 1.0}, state or {})


def test_wandb_gets_the_same_rows_and_resumes_the_same_run(tmp_path, fake_wandb, monkeypatch):
    run, log = wandb_log(tmp_path)
    with run, log:
        log.write({"counters/examples": 4, "loss/train": 0.5})
        state = log.state()
    arguments, started = fake_wandb[0]
    assert (arguments["mode"], arguments["id"], arguments["config"]) == ("offline", None, {"lr": 1.0})
    assert started.rows == [{"counters/examples": 4, "loss/train": 0.5}]
    assert ("*", "counters/examples") in started.metrics
    assert started.exit_code == 0
    monkeypatch.setenv("WANDB_API_KEY", "0")
    run, log = wandb_log(tmp_path, state)
    with run, log:
        pass
    assert (fake_wandb[1][0]["id"], fake_wandb[1][0]["resume"]) == ("abc123", "allow")


def test_a_wandb_that_fails_does_not_stop_the_run(tmp_path, fake_wandb, capsys, monkeypatch):
    """Slurm signals a whole step: wandb's own process is gone before the run has saved."""
    monkeypatch.setattr(FakeRun, "log", lambda self, row: (_ for _ in ()).throw(BrokenPipeError()))
    monkeypatch.setattr(FakeRun, "finish", lambda self, exit_code: pytest.fail("it is left out from there on"))
    run, log = wandb_log(tmp_path)
    with run, log:
        for examples in (4, 8):
            log.write({"counters/examples": examples})
        assert log.state()["wandb_id"] == "abc123"  # a later start resumes the same run
    assert run.metrics.read_text().count("\n") == 2
    assert capsys.readouterr().err.count("wandb failed (BrokenPipeError)") == 1


SIGNALLED = """
import os, signal, sys
from pathlib import Path

from config.settings import TrainConfig
from trainers.distributed.preemption import Preempted
from trainers.run.metrics_log import MetricsLog
from trainers.run.run_dir import RunDir

run = RunDir.open(Path(sys.argv[1]), config={}, manifest={})
try:
    with run, MetricsLog(run, TrainConfig(exp_name="x"), {}, {}) as log:
        children = " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/children")).split()
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        print("killed", len(children))
        log.write({"counters/examples": 4})
        raise Preempted
except Preempted:
    pass
"""


@pytest.mark.slow
def test_wandb_says_nothing_more_when_its_process_was_signalled_with_ours(tmp_path, no_key):
    """In an interpreter of its own, whose end is what is looked at."""
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(tmp_path / "run")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout == "killed 1\n"
    assert "Traceback" not in done.stderr
    assert "atexit" not in done.stderr
    assert done.returncode == 0


def test_sample_text_reaches_wandb_only_if_asked_for(tmp_path, fake_wandb):
    for log_text in (False, True):
        run, log = wandb_log(tmp_path / str(log_text), log_text=log_text)
        with run, log:
            log.write_samples([{"output": "some text"}], 8)
        assert "some text" in run.samples.read_text()
    assert fake_wandb[0][1].rows == []
    assert "samples" in fake_wandb[1][1].rows[0]


def test_debug_and_failures_reach_wandb(tmp_path, fake_wandb):
    run, log = wandb_log(tmp_path / "debug", debug=True)
    with run, log:
        pass
    assert fake_wandb == []
    run, log = wandb_log(tmp_path / "failing")
    with run, pytest.raises(RuntimeError), log:
        raise RuntimeError
    assert fake_wandb[0][1].exit_code == 1


def test_off_a_terminal_the_progress_line_is_a_few_lines():
    stream = io.StringIO()
    line = ProgressLine(1000, 0, stream)
    for done in range(0, 1001, 10):
        line.update(done, "loss 0.5")
    line.close()
    assert stream.getvalue().count("\n") == 1
    assert "1000/1000 examples" in stream.getvalue()
    assert "loss 0.5" in stream.getvalue()


def test_numbers_of_the_host_join_those_of_the_device():
    """On a GPU the loss is there, the learning rate here; `meta` is a second device, whose values nobody can read."""
    sums = MetricSums()
    for _ in range(2):  # no addition waits for the device, or copies to it
        sums.add("loss/train", torch.tensor(1.0, device="meta"), 2.0)
        sums.add("learning_rate", 1e-3, 1.0)
        sums.add("grad_norm", torch.tensor(3.0), torch.tensor(1))
    assert sums._sums["loss/train"].device.type == "meta"
    assert (sums._sums["learning_rate"], sums._sums["grad_norm"], sums._counts["loss/train"]) == (2e-3, 6.0, 4.0)


def test_means_of_host_and_device_are_in_one_table():
    def body():
        sums = MetricSums()
        sums.add("grad_norm", torch.tensor(6.0, dtype=torch.float32), 2)
        sums.add("learning_rate", 1e-3, 4.0)
        sums.peak("memory/peak", 3.5)
        copy = MetricSums()
        copy.load(json.loads(json.dumps(sums.state())))
        copy.add("grad_norm", torch.tensor(3.0), 1)  # on top of numbers that a checkpoint gave
        assert sums.means() == {"grad_norm": 3.0, "learning_rate": 1e-3 / 4, "memory/peak": 3.5}
        assert copy.means() == {"grad_norm": 3.0, "learning_rate": 1e-3 / 4}

    in_group(body)


def test_the_points_of_a_sweep_are_told_apart_in_wandb_and_an_offline_run_says_so(tmp_path, fake_wandb, capsys):
    for folder in ("x", "x/lr=1e-05,seed=0", "x/lr=1e-05,seed=1"):
        run, log = wandb_log(tmp_path / folder)
        with run, log:
            pass
        said = capsys.readouterr().err.replace("'", "")
        assert f"wandb sync {tmp_path / folder}/wandb/offline-run-*" in said
    given = [(arguments["name"], arguments["group"]) for arguments, _ in fake_wandb]
    assert given == [("x", None), ("x lr=1e-05,seed=0", "x"), ("x lr=1e-05,seed=1", "x")]


def test_off_a_terminal_what_takes_long_says_so(monkeypatch):
    class Said(io.StringIO):
        def write(self, text):
            written = super().write(text)
            said.set()
            return written

    said = threading.Event()
    stream = Said()
    monkeypatch.setattr("sys.stderr", stream)
    with saying("evaluation", active=True, seconds=0.01):
        assert said.wait(60)
    assert stream.getvalue().startswith("evaluation: 00:00 so far")
    said.clear()
    with saying("evaluation", active=False, seconds=0.01):
        assert not said.wait(0.05)
    monkeypatch.setattr(stream, "isatty", lambda: True)
    with saying("evaluation", active=True, seconds=0.01):  # a terminal shows bars
        assert not said.wait(0.05)
    with saying("real steps", active=True, seconds=0.01, always=True):
        assert said.wait(60)
