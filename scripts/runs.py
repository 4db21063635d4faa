"""List every training run below a folder: state, progress, last loss, checkpoint, host, and the command to resume it.

    python -m scripts.runs               # the runs below runs/
    python scripts/runs.py FOLDER ...

It only reads files and takes no lock, so it disturbs no run, and it does not import torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to import the repository's modules

from config.console import duration, open_console
from config.errors import UserError
from config.paths import saved_checkpoints
from config.reading import read_json_lines, read_mapping
from safer_instruct.text.display import markdown_table

QUIET_SECONDS = 900.0  # a run on another host that has written nothing for this long counts as stopped
HOLDER = re.compile(r"process (\d+) on (\S+)")  # as RunDir writes it to .lock.holder
HEADER = ("run", "state", "examples", "of", "loss", "checkpoint", "host")


@dataclass(frozen=True)
class Status:
    """The state of one run."""

    path: Path  # its folder
    state: str  # running | finished | stopped
    examples: int  # seen so far, from the newest row of metrics.jsonl or the newest checkpoint
    total: int | None  # examples of the whole run; None before it has read its data
    loss: str  # the last logged loss, with its name; "" if none was logged
    checkpoint_at: float | None  # when the newest checkpoint was written, in seconds since the epoch; None without one
    host: str  # where it runs, or last ran; "" if unknown
    command: str  # the command that started it


def main() -> int:
    """Print the table of all runs, and the commands that resume the stopped ones."""
    open_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], metavar="FOLDER")
    folders = parser.parse_args().folders
    now = time.time()
    found = []
    for path in (run for folder in folders for run in run_folders(folder)):
        try:
            found.append(read_status(path, now))
        except UserError as error:
            print(f"note: {error}", file=sys.stderr)
    if not found:
        print(f"no run of train.py below {', '.join(map(str, folders))}", file=sys.stderr)
        return 2
    print(markdown_table(HEADER, [_row(status, now) for status in found], left=(0, 1, 4, 5, 6)))
    stopped = [status for status in found if status.state == "stopped" and status.command]
    if stopped:
        print("\nto resume the stopped runs:")
        print("\n".join(f"  {status.command}" for status in stopped))
    return 0


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of runs below a folder, including points of sweeps, sorted by name."""
    found = (manifest.parent for manifest in folder.rglob("manifest.json"))
    return sorted(path for path in found if (path / "config.yaml").is_file())


def read_status(path: Path, now: float) -> Status:
    """Read the state of a run from its files; `now` is in seconds since the epoch.

    Raises:
        UserError: One of its files is damaged.
    """
    try:
        return _read_status(path, now)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its files are not as train.py wrote them ({type(error).__name__})") from error


def _read_status(path: Path, now: float) -> Status:
    config, manifest = read_mapping(path / "config.yaml"), read_mapping(path / "manifest.json")
    row = _last_row(path / "metrics.jsonl")
    newest = next(reversed(saved_checkpoints(path)), None)
    progress = {} if newest is None else read_mapping(newest / "state" / "progress.json")
    total = _total_examples(config, manifest)
    saved = progress.get("examples", 0)
    is_finished = total is not None and saved >= total and progress["evaluated_at"] == saved
    process, host = _holder(path)
    state = "finished" if is_finished else "stopped"
    if not is_finished and _is_running(path, process, host, now):
        state = "running"
    return Status(
        path=path,
        state=state,
        examples=max(saved, int(row.get("counters/examples", 0))),
        total=total,
        loss=next((f"{name} {row[name]:.4g}" for name in ("loss/train", "loss/eval") if name in row), ""),
        checkpoint_at=None if newest is None else (newest / "state" / "progress.json").stat().st_mtime,
        host=host,
        command=shlex.join(manifest.get("command", [])),
    )


def _total_examples(config: dict[str, Any], manifest: dict[str, Any]) -> int | None:
    """Return the examples of the whole run: epochs times rows, or `n_examples` if that is less."""
    rows = manifest.get("data", {}).get("train", {}).get("rows")
    limits = [config["n_examples"], None if rows is None or not config["n_epochs"] else rows * config["n_epochs"]]
    return min((limit for limit in limits if limit is not None), default=None) if rows is not None else None


def _last_row(metrics: Path) -> dict[str, Any]:
    """Return the newest complete row; a run may be writing the next line."""
    newest = deque(read_json_lines(metrics), maxlen=1) if metrics.exists() else ()
    return next(iter(newest), {})


def _holder(path: Path) -> tuple[int, str]:
    """Return the process and host that last held the run's lock; (0, "") if there is none."""
    holder = path / ".lock.holder"
    told = HOLDER.match(holder.read_text(encoding="utf-8")) if holder.exists() else None
    return (int(told[1]), told[2]) if told else (0, "")


def _is_running(path: Path, process: int, host: str, now: float) -> bool:
    """Tell whether the run's process is alive: by its id on this host, else by the age of its files."""
    if host == socket.gethostname():
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # alive, but another user's
            return True
        return True
    files = [file for file in (path / "metrics.jsonl", path / ".lock.holder") if file.exists()]
    return bool(host) and max(file.stat().st_mtime for file in files) > now - QUIET_SECONDS


def _row(status: Status, now: float) -> tuple[object, ...]:
    age = "none" if status.checkpoint_at is None else f"{duration(now - status.checkpoint_at)} ago"
    total = "" if status.total is None else status.total
    return str(status.path), status.state, status.examples, total, status.loss, age, status.host


if __name__ == "__main__":
    sys.exit(main())
