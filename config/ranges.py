"""Single values: is it one of the choices, in its range, an existing path? Answers are lists of complete messages."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from config.paths import find_path
from config.settings import MISSING


def share(key: str, value: float | None) -> list[str]:
    """A value that is no share in (0, 1]."""
    return [] if value is None or 0 < value <= 1 else [f"{key}={value}: must lie in (0, 1]"]


def one_of(key: str, value: str, choices: Sequence[str]) -> list[str]:
    """A value that is none of the choices; the nearest is suggested."""
    if value in choices or value == MISSING:
        return []
    guess = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    meant = f"; did you mean {guess[0]}?" if guess else ""
    return [f"{key}={value}: no such choice{meant} Choices: {', '.join(choices)}"]


def switch(key: str, value: bool | str, choices: Sequence[str]) -> list[str]:
    """A value that is neither true nor false nor one of the choices."""
    return [] if isinstance(value, bool) else [f"{error}, true, false" for error in one_of(key, value, choices)]


def at_least(key: str, value: float | None, least: float) -> list[str]:
    """A value below its least one; None is not set."""
    return [f"{key}={value}: must be {least} or more"] if value is not None and not value >= least else []


def above(key: str, value: float, bound: float) -> list[str]:
    """A value that does not exceed its bound, or is infinite."""
    return [] if value > bound and value != float("inf") else [f"{key}={value}: must be above {bound}, and finite"]


def existing_path(key: str, value: str | None) -> list[str]:
    """A path that does not exist; None is not set."""
    if not value or value == MISSING or find_path(value).exists():
        return []
    return [f"{key}={value}: there is no such file or folder{neighbours(value)}"]


def neighbours(value: str) -> str:
    """`; did you mean ...?`, from the folder that the path points into."""
    path = Path(value).expanduser()
    if not path.parent.is_dir():
        return f" ({path.parent} does not exist either)"
    names = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1, cutoff=0.6)
    return f"; did you mean {path.parent / names[0]}?" if names else ""
