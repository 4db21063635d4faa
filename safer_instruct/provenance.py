"""Record where a result came from: the package versions, and the state of this repository."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from config.paths import REPOSITORY

PACKAGES = ("torch", "transformers", "tokenizers", "hydra-core", "datasets", "numpy", "matplotlib", "openai")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that can affect results."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def git_state() -> dict[str, Any]:
    """Return the commit of this repository, and whether tracked files differ from it; both None outside a checkout."""
    sha = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if sha else None
    return {"sha": sha, "dirty": bool(changes) if changes is not None else None}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
