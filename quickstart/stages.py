"""Stages of a long program: each is a separate command, printed so that you can copy it, and run only once.

This file does not import torch: it only starts commands, and records which of them have succeeded.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any


class Stages:
    """The finished stages of one output folder.

    Args:
        file: JSONL of {"name", "command", "seconds"}, one line per finished stage.
        again: The command that resumes after a failed stage.
    """

    def __init__(self, file: Path, *, again: str) -> None:
        self.file = file
        self._again = again

    def run(self, name: str, command: list[str]) -> int:
        """Print and run one command, and record its time; skip a stage already recorded with this command."""
        line = shlex.join(["python", *command])
        if any(record["name"] == name and record["command"] == line for record in self.records()):
            print(f"\n[{name}] finished before, skipped: {line}", flush=True)
            return 0
        print(f"\n[{name}]\n{line}", flush=True)
        started = time.monotonic()
        status = subprocess.run([sys.executable, *command], check=False).returncode
        seconds = time.monotonic() - started
        if status != 0:
            print(f"[{name}] failed with exit status {status}; `{self._again}` resumes from here", file=sys.stderr)
            return status
        record = {"name": name, "command": line, "seconds": round(seconds, 1)}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"[{name}] {seconds:.0f} s", flush=True)
        return 0

    def records(self) -> list[dict[str, Any]]:
        """Return the finished stages."""
        if not self.file.exists():
            return []
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines() if line]


def from_anywhere(here: Path, path: str | None) -> str | None:
    """Return a path that was typed in the folder `here` as seen from anywhere: the stages run in the repository."""
    return str(here / Path(path).expanduser()) if path else None


def move_other_aside(output: Path, settings: Any, stamp_name: str) -> None:
    """Make the output folder; one made with other settings is renamed first, so that nothing is mixed or lost.

    Args:
        output: The folder to make.
        settings: A dataclass with a `seed`, saved in the folder.
        stamp_name: Name of the file with the settings.
    """
    stamp = output / stamp_name
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) != asdict(settings):
        seed = json.loads(stamp.read_text(encoding="utf-8"))["seed"]
        names = (f"{output.name}_seed{seed}{suffix}" for suffix in ("", *(f"_{i}" for i in range(2, 1000))))
        aside = next(output.with_name(name) for name in names if not output.with_name(name).exists())
        output.rename(aside)
        print(f"{output} was made with other settings: it is now {aside}")
    output.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(asdict(settings)) + "\n", encoding="utf-8")
