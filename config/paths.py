"""Where a path of the command line is looked up."""

from __future__ import annotations

import os
import re
from pathlib import Path

FILE_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".arrow", ".gz", ".zst", ".txt")  # of no name on the hub
REPOSITORY = Path(__file__).resolve().parent.parent


def program(name: str) -> str:
    """Return how the program `name` (train, induce, evaluate) is typed: from a checkout, or where it is installed."""
    return f"python {name}.py" if (REPOSITORY / "pyproject.toml").exists() else f"safer-instruct {name}"


def find_path(path: str | Path) -> Path:
    """Return the file or folder that `path` names: from the working directory, or else from the repository root.

    The second place lets `model=tiny` (the shipped `quickstart/model`) work from any directory. Where neither exists
    the first is returned, so that an error message names the place that the user meant.
    """
    here = Path(os.path.expanduser(path))  # pathlib's raises for a user who is not there
    if here.is_absolute() or here.exists():
        return here
    shipped = REPOSITORY / here
    return shipped if shipped.exists() else here


def step_of(checkpoint: Path) -> int:
    """Return the examples seen, of a folder `step-<examples>`."""
    return int(checkpoint.name.removeprefix("step-"))


def saved_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; what has another name than they have is somebody else's."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((one for one in folders if re.fullmatch("step-[0-9]+", one.name) and one.is_dir()), key=step_of)


def may_be_on_hub(path: str) -> bool:
    """Say whether what is no path here may be a dataset of the hub: ORG/NAME, and no typo in a folder that is there."""
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) and Path(path).suffix.lower() not in FILE_SUFFIXES
    return bool(is_name) and not find_path(path).exists() and not Path(path).parent.is_dir()
