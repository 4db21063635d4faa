"""Where a path of the command line is looked up."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def program(name: str) -> str:
    """Return how the program `name` (train, induce, evaluate) is typed: from a checkout, or where it is installed."""
    return f"python {name}.py" if (REPOSITORY / "pyproject.toml").exists() else f"safer-instruct {name}"


def find_path(path: str | Path) -> Path:
    """Return the file or folder that `path` names: from the working directory, or else from the repository root.

    The second place lets `model=tiny` (the shipped `quickstart/model`) work from any directory. Where neither exists
    the first is returned, so that an error message names the place that the user meant.
    """
    here = Path(path).expanduser()
    if here.is_absolute() or here.exists():
        return here
    shipped = REPOSITORY / here
    return shipped if shipped.exists() else here
