"""The log of a run: `metrics.jsonl`, `samples.jsonl` and wandb. No other file imports wandb.

The x-axis is `counters/examples`, so that runs with different batch sizes can be compared.
"""

from __future__ import annotations

import errno
import json
import netrc
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlparse

from xxhash import xxh3_128

from config.checksums import hash_prefix
from config.errors import UserError
from config.settings import TrainConfig, WandbSettings
from trainers.distributed.preemption import Preempted
from trainers.run.run_dir import RunDir, truncate


def wandb_mode(settings: WandbSettings) -> str:
    """Return `online`, `offline` or `disabled`, without network access; `auto` is online if there is a key.

    The key is `WANDB_API_KEY`, or the server's entry in the netrc file, where `wandb login` writes it.
    """
    if not settings.enabled:
        return "disabled"
    if settings.mode != "auto":
        return settings.mode
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = os.environ.get("NETRC", str(Path.home() / ".netrc"))
    try:
        return "online" if netrc.netrc(path).authenticators(host) else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


class MetricsLog:
    """`metrics.jsonl`, `samples.jsonl` and wandb of one run; use as a context manager."""

    def __init__(
        self, run: RunDir, settings: TrainConfig, config: Mapping[str, Any], state: Mapping[str, Any], *,
        active: bool = True,
    ) -> None:  # fmt: skip
        """Open them where `state` (of the checkpoint that is resumed, or empty) left off: later rows are dropped.

        An inactive log, as in all processes but rank 0, writes nothing.

        Raises:
            UserError: A file differs from the one that the checkpoint recorded.
        """
        self._active = active
        self._wandb: Any = None
        self._wandb_id: str | None = None
        if not active:
            return
        self._settings = settings
        self._metrics = _JsonLines(run.metrics, state.get("files", {}))
        self._samples = _JsonLines(run.samples, state.get("files", {}))
        mode = "disabled" if settings.debug else wandb_mode(settings.wandb)
        if mode != "disabled":
            self._wandb = _start_wandb(run, settings, config, mode, state.get("wandb_id"))
            self._wandb_id = self._wandb.id

    def write(self, values: Mapping[str, float]) -> None:
        """Write a row of metrics, including `counters/examples`. It survives a crash of this process."""
        if not self._active:
            return
        self._metrics.append(values)
        self._tell_wandb(lambda run: run.log(dict(values)))

    def write_samples(self, rows: list[dict[str, Any]], examples: int) -> None:
        """Write rows of text, each with `counters/examples`; send them to wandb only if `log_text`."""
        if not self._active:
            return
        for row in rows:
            self._samples.append({"counters/examples": examples, **row})
        if self._wandb is not None and self._settings.log_text and rows:
            import wandb

            columns: list[str | int] = list(rows[0])
            table = wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
            self._tell_wandb(lambda run: run.log({"samples": table, "counters/examples": examples}))

    def state(self) -> dict[str, Any]:
        """Sync the rows so far to disk, and return the state from which a checkpoint continues after them."""
        if not self._active:
            return {}
        files = {lines.path.name: lines.state() for lines in (self._metrics, self._samples)}
        return {"files": files} if self._wandb_id is None else {"files": files, "wandb_id": self._wandb_id}

    def _tell_wandb(self, call: Callable[[Any], object]) -> None:
        """Call the wandb run; if that fails, continue without wandb: the rows are in `metrics.jsonl`.

        On preemption Slurm signals the whole step, so wandb's own process dies before this one has saved.
        """
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:  # any failure of its pipes, sockets or threads: none must end the training
            print(
                f"note: wandb failed ({type(error).__name__}) and is not used any more; all rows are in "
                f"{self._metrics.path}", file=sys.stderr, flush=True,
            )  # fmt: skip
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files and finish the wandb run; after an exception, mark it as preempted or failed."""
        if not self._active:
            return
        self._metrics.close()
        self._samples.close()
        if kind is Preempted:
            self._tell_wandb(lambda run: run.mark_preempting())
        self._tell_wandb(lambda run: run.finish(exit_code=0 if error is None else 1))
        if self._wandb_id is not None and (self._wandb is None or kind is Preempted):
            _forget_wandb()


def _forget_wandb() -> None:
    """Remove wandb's exit hook, which would print a traceback if wandb's process was killed by a signal."""
    import wandb

    with suppress(Exception, SystemExit):  # SystemExit: the exit status of wandb's process
        wandb.teardown()


class _JsonLines:
    """An append-only file of JSON lines, and the hash of its contents."""

    def __init__(self, path: Path, seen: Mapping[str, tuple[int, str]]) -> None:
        """Truncate the file to what a checkpoint has `seen` of it: name -> (bytes, xxh3). A missing file starts empty.

        Raises:
            UserError: The beginning of the file differs from that.
        """
        self.path = path
        size, digest = seen.get(path.name, (0, ""))
        if size and path.exists() and (path.stat().st_size < size or hash_prefix(path, size) != digest):
            raise UserError(
                f"{path}: its first {size} bytes differ from those that the newest checkpoint recorded. Restore it "
                "from a copy, or delete it: it then starts where the run resumes, and the weights are the same."
            )
        truncate(path, size)
        self._digest = xxh3_128(path.read_bytes() if path.exists() else b"")
        self._file = path.open("ab", buffering=0)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row. It survives a crash of this process."""
        line = json.dumps(row).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"could not write to {self.path} ({error.strerror}); free some space and rerun the command: it resumes "
                "from the newest checkpoint."
            ) from error
        self._digest.update(line)

    def state(self) -> tuple[int, str]:
        """Sync the rows so far to disk, and return the file's length and hash."""
        os.fsync(self._file.fileno())
        return self._file.tell(), self._digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _start_wandb(run: RunDir, settings: TrainConfig, config: Mapping[str, Any], mode: str, run_id: str | None) -> Any:
    point = run.path.name if "=" in run.path.name else ""  # of a sweep: in the run's name, and all in one group
    started = _init_wandb(
        replace(settings.wandb, group=settings.wandb.group or (settings.exp_name if point else None)), mode,
        "Use wandb.mode=offline and `wandb sync` later.", name=f"{settings.exp_name} {point}".rstrip(),
        config=dict(config), dir=str(run.path), id=run_id, resume="allow" if mode == "online" else None,
    )  # fmt: skip
    if mode == "offline":
        parts = shlex.quote(str(run.path / "wandb"))
        print(
            f"note: wandb is offline; to send this run: wandb sync {parts}/offline-run-*", file=sys.stderr, flush=True
        )
    started.define_metric("counters/examples")
    started.define_metric("*", step_metric="counters/examples")
    return started


def _init_wandb(settings: WandbSettings, mode: str, instead: str, **arguments: Any) -> Any:
    """Start a wandb run; `instead` is the advice at the end of the error message."""
    import wandb

    try:
        return wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            tags=settings.tags,
            mode=mode,  # type: ignore[arg-type]  # a str here, checked by config/checks.py
            # Give up after half a minute without an answer, so that a job array fails early.
            settings=wandb.Settings(silent=mode != "online", init_timeout=30),
            **arguments,
        )
    except wandb.Error as error:
        raise UserError(f"wandb.mode={mode} failed: {error}. {instead}") from error


def log_tables(
    settings: WandbSettings, *, name: str, folder: str, tables: Mapping[str, tuple[list[str], list[list[Any]]]]
) -> None:
    """Send the tables of a report, title -> (columns, rows), to a wandb run of their own.

    Do nothing with `mode=auto` and no key: the report is on disk.

    Raises:
        UserError: The wandb run cannot be started.
    """
    mode = wandb_mode(settings)
    waits_for_key = mode == "offline" and settings.mode == "auto" and "WANDB_MODE" not in os.environ
    if mode == "disabled" or waits_for_key:
        return
    import wandb

    instead = "The report is written to disk; use wandb.mode=disabled to leave wandb out."
    run = _init_wandb(settings, mode, instead, name=name, job_type="evaluate", dir=folder)
    # A column of a wandb table has one type; a rate that was not counted is None among the numbers.
    run.log({title: wandb.Table(columns=list(head), data=rows) for title, (head, rows) in tables.items()})
    run.finish()
