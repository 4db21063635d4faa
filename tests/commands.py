"""Runs `train.py` the way a user does: in this process where that is enough, in one of its own where it is not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config.checks_train import check_train
from config.schema import read_command, run_command
from config.settings import TrainConfig
from tests import warm
from tests.warm import ROOT

Process = warm.Popen | subprocess.Popen[str]
WORDS = ["apple", "banana", "cherry", "cat", "mat", "sum", "task", "list", "the", "a", "of", "on", "sat", "fruits"]


def run_entrypoint(config_name: str, config_class: type, check: Any, main: Any) -> None:
    """Read the command line in `sys.argv` and run it, as an entrypoint does."""
    run_command(read_command(config_name, config_class, check), main)


def configs_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """The configs that `python train.py ARGUMENTS` would train with: one, or one for each point of a sweep."""
    seen: list[TrainConfig] = []
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    run_entrypoint("config", TrainConfig, check_train, seen.append)
    return seen


def errors_of(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], main: Any = None
) -> list[str]:
    """The lines of the message with which `python train.py ARGUMENTS` ends; the exit status is asserted to be 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_entrypoint("config", TrainConfig, check_train, main or (lambda config: pytest.fail(f"it ran: {config}")))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message.splitlines()


def start(arguments: list[str], folder: Path, *, fresh: bool = False, **environment: str) -> Process:
    """`python train.py ARGUMENTS` as a process of its own, in `folder`; `fresh`: of an interpreter of its own."""
    settings = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    return (subprocess.Popen if fresh else warm.Popen)(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        env={**os.environ, **settings, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    arguments: list[str], folder: Path, *, status: int = 0, fresh: bool = False, **environment: str
) -> tuple[str, str]:
    """Runs `python train.py ARGUMENTS` to its end; returns stdout and stderr."""
    process = start(arguments, folder, fresh=fresh, **environment)
    out, err = process.communicate(timeout=1500)
    assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
    return out, err


def write_pairs(path: Path, num_rows: int = 40, seed: int = 0) -> Path:
    """A preference file of harmless word salad, responses of unequal length."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    rows = [
        {
            "id": f"row-{i}",
            "instruction": f"{text(3, 5)} {i}",
            "chosen": text(2, 9),
            "rejected": text(2, 9),
            "label": "x",
        }
        for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_alpaca(path: Path, num_rows: int = 30) -> Path:
    """Instruction data in Alpaca's schema, every other row with an input."""
    rows = [
        {"instruction": f"list the fruits {i}", "input": "" if i % 2 else "apple cat", "output": f"banana sum {i}"}
        for i in range(num_rows)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics that must not depend on the clock."""
    timed = ("examples_per_second", "tokens_per_second", "data_wait_seconds", "memory/peak")
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]
