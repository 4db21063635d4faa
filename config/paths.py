"""Where paths of the command line are looked up."""

from __future__ import annotations

import os
import re
from pathlib import Path

FILE_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".arrow", ".gz", ".zst", ".txt")  # never of a name on the hub
REPOSITORY = Path(__file__).resolve().parent.parent


def program(name: str) -> str:
    """Return the command that starts the program `name` (train, induce, evaluate), in a checkout or when installed."""
    return f"python {name}.py" if (REPOSITORY / "pyproject.toml").exists() else f"safer-instruct {name}"


def find_path(path: str | Path) -> Path:
    """Return the file or folder that `path` names, relative to the working directory or else to the repository root.

    The repository root lets `model=tiny` (the shipped `quickstart/model`) work from any directory. If neither exists,
    the first is returned, so that an error message names the place that the user meant.
    """
    here = Path(os.path.expanduser(path))  # pathlib's raises for a user who is not there
    if here.is_absolute() or here.exists():
        return here
    shipped = REPOSITORY / here
    return shipped if shipped.exists() else here


def step_of(checkpoint: Path) -> int:
    """Return the number of examples seen at a checkpoint, from its folder name `step-<examples>`."""
    return int(checkpoint.name.removeprefix("step-"))


def saved_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first; anything with another name is ignored."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted((one for one in folders if re.fullmatch("step-[0-9]+", one.name) and one.is_dir()), key=step_of)


def may_be_on_hub(path: str) -> bool:
    """Tell whether a path may name a hub dataset: ORG/NAME that does not exist here, in no existing folder (a typo)."""
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) and Path(path).suffix.lower() not in FILE_SUFFIXES
    return bool(is_name) and not find_path(path).exists() and not Path(path).parent.is_dir()
