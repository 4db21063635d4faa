"""`python -m scripts.runs`: what it says of real runs that finished, stopped or are under way."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from config.paths import REPOSITORY
from scripts import runs
from scripts.runs import read_status, run_folders
from tests.commands import write_pairs


@pytest.fixture
def run(here, tmp_path, tiny_model_folder):
    """A finished run of 40 pairs; all are trained on."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 40)
    here(
        "loss=dpo", "model=blank_model", f"model.name_or_path={tiny_model_folder}", f"datasets.si.path={pairs}",
        "datasets.si.eval_fraction=0", "exp_name=a", "batch_size=8", "warmup_steps=0", "checkpoint.every_examples=8",
        "minimum_log_interval_secs=0",
    )  # fmt: skip
    return tmp_path / "runs" / "a"


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def holder(run, process: int, host: str) -> None:
    (run / ".lock.holder").write_text(f"process {process} on {host} since 2026-01-01 00:00:00")


def half_done(run) -> None:
    """Make of a finished run one that stands at half of its examples."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["data"]["train"]["rows"] = 80
    (run / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_is_finished_then_stopped_or_running(run):
    now = time.time()
    done = read_status(run, now)
    assert (done.state, done.examples, done.total) == ("finished", 40, 40)
    assert done.host == socket.gethostname()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert done.loss == f"loss/train {last['loss/train']:.4g}"
    assert 0 <= now - done.checkpoint_at < 300

    half_done(run)
    holder(run, dead_process(), socket.gethostname())
    assert (read_status(run, now).state, read_status(run, now).total) == ("stopped", 80)
    holder(run, os.getpid(), socket.gethostname())
    assert read_status(run, now).state == "running"

    holder(run, 1, "another-host")
    assert read_status(run, time.time()).state == "running", "its files are new"
    assert read_status(run, time.time() + 3600).state == "stopped", "and now they are old"


def test_a_limit_of_examples_and_lines_that_are_being_written(run):
    config = (run / "config.yaml").read_text().replace("n_examples: null", "n_examples: 16")
    (run / "config.yaml").write_text(config)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"counters/examples": 9')
    assert (read_status(run, 0.0).examples, read_status(run, 0.0).total) == (40, 16)
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    fresh = read_status(run, 0.0)
    assert (fresh.examples, fresh.loss, fresh.checkpoint_at) == (0, "", None)


def test_the_table_names_every_run_and_what_to_type(run, monkeypatch, capsys):
    half_done(run)
    holder(run, dead_process(), socket.gethostname())
    shutil.copytree(run, run.parent / "sweep" / "loss.beta=0.1", symlinks=True)
    assert [path.name for path in run_folders(run.parent)] == ["a", "loss.beta=0.1"]
    monkeypatch.setattr(sys, "argv", ["runs"])
    assert runs.main() == 0
    out = capsys.readouterr().out
    assert out.count("| stopped ") == 2
    command = json.loads((run / "manifest.json").read_text())["command"]
    assert out.splitlines()[-1].split() == out.splitlines()[-2].split()
    assert command[0] in out.splitlines()[-1]
    monkeypatch.setattr(sys, "argv", ["runs", "nowhere"])
    assert runs.main() == 2
    assert "no run of train.py below nowhere" in capsys.readouterr().err


def test_it_may_be_called_as_a_file_from_anywhere(tmp_path):
    command = [sys.executable, str(REPOSITORY / "scripts" / "runs.py"), "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no run of train.py below nowhere" in done.stderr


def test_it_imports_no_torch():
    code = "import sys, scripts.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
