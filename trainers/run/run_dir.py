"""The directory of one run: its lock, and the check that the command belongs to it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import yaml
from filelock import FileLock, Timeout

from config.errors import UserError
from config.files import write_text
from config.reading import read_mapping
from config.run_keys import checkpoint_owner, differing_keys


def remove(path: Path) -> None:
    """Delete a folder, a file, or a link (not what it points to)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


class RunDir:
    """A locked run directory. Use `with RunDir.open(...) as run`; the OS releases the lock when the process ends."""

    def __init__(self, path: Path, lock: FileLock | None, config: Mapping[str, Any] | None = None) -> None:
        """Use `open` in rank 0, and `RunDir(path, None)` in the other processes."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.latest = path / "LATEST"  # link to the newest checkpoint
        self.best = path / "BEST"  # link to the best checkpoint, with `checkpoint.keep_best`
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self._lock, self.config = lock, config or {}  # what `open` wrote; empty in other processes
        self.manifest: Mapping[str, Any] = {}  # likewise

    @classmethod
    def open(cls, path: Path, *, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> Self:
        """Create and lock the directory, and write `config.yaml` and `manifest.json`.

        Raises:
            UserError: another process holds the lock (it is named), the directory belongs to a run with another
                config (the differing keys are listed), or it is not writable.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = cls._acquire(path)
        except OSError as error:
            raise UserError(f"run_dir {path} cannot be written to ({error.strerror}); choose another.") from error
        run = cls(path, lock, config)
        try:
            run._check_config(config)
            write_text(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False), durable=True)
            run.write_manifest(manifest)
            run._remove_partials()
        except BaseException:
            lock.release()
            raise
        return run

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace `manifest.json`."""
        self.manifest = manifest
        write_text(self.path / "manifest.json", json.dumps(manifest, indent=2, default=str) + "\n", durable=True)

    @staticmethod
    def _acquire(path: Path) -> FileLock:
        lock, holder = FileLock(path / ".lock"), path / ".lock.holder"
        try:
            lock.acquire(timeout=0)
        except Timeout:
            try:
                who = holder.read_text(encoding="utf-8", errors="replace")[:200]
            except FileNotFoundError:
                who = "a process that has just started"
            raise UserError(
                f"run_dir {path} is in use by {who}; wait for it, stop it, or choose another exp_name or run_dir."
            ) from None
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()} since {started}")
        return lock

    def _check_config(self, config: Mapping[str, Any]) -> None:
        stored = self.path / "config.yaml"
        if not stored.exists() or not self.has_results():
            return  # there is nothing that this command could resume by mistake
        before = read_mapping(
            stored,
            "so it cannot be compared with this command. Restore the file from a copy, delete it if "
            "the command is the same, or choose another exp_name.",
        )
        lines = differing_keys(before, config)
        if lines:
            raise UserError(
                f"run_dir {self.path} holds a run of another config:\n  " + "\n  ".join(lines) + "\nGive this run its "
                "own exp_name (or run_dir), restore the values to resume that run, or delete the directory."
            )

    def has_results(self) -> bool:
        """Return whether there is a checkpoint or a row of metrics."""
        has_metrics = self.metrics.exists() and self.metrics.stat().st_size > 0
        return has_metrics or any(self.checkpoints.glob("step-*"))

    def _remove_partials(self) -> None:
        """Remove unfinished checkpoints of a killed process. We hold the lock, so no other process is writing."""
        for partial in self.checkpoints.glob(".*.partial"):
            remove(partial)

    def owner(self, checkpoint: Path) -> str:
        """Return the owner recorded in a checkpoint of this run (rank 0 only: the others have no config)."""
        return checkpoint_owner(self.config, checkpoint.name)

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def truncate(path: Path, length: int) -> None:
    """Truncate a file to the `length` bytes that a checkpoint recorded; do nothing if the file is missing."""
    with suppress(FileNotFoundError):
        if path.stat().st_size > length:
            os.truncate(path, length)
