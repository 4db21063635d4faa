"""The log of a run: `metrics.jsonl`, `samples.jsonl` and wandb. Nothing but this file knows wandb.

The x-axis is `counters/examples`, so that runs with different batch sizes lie over each other.
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
    """Return `online`, `offline` or `disabled`; `auto` is online where there is a key. Touches no network.

    A key is `WANDB_API_KEY`, or an entry of the server's in the netrc file, where `wandb login` puts it.
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

        One that is not active, as in every process but the first, writes nothing.

        Raises:
            UserError: A file is not what the checkpoint has seen.
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
        """Write a row of metrics, `counters/examples` among them. A crash of this process does not lose it."""
        if not self._active:
            return
        self._metrics.append(values)
        self._tell_wandb(lambda run: run.log(dict(values)))

    def write_samples(self, rows: list[dict[str, Any]], examples: int) -> None:
        """Write rows of text, each with the counter; to wandb only if `log_text`."""
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
        """Return what a checkpoint must know to continue after this row; make the rows so far durable."""
        if not self._active:
            return {}
        files = {lines.path.name: lines.state() for lines in (self._metrics, self._samples)}
        return {"files": files} if self._wandb_id is None else {"files": files, "wandb_id": self._wandb_id}

    def _tell_wandb(self, call: Callable[[Any], object]) -> None:
        """Call the wandb run; if that fails, go on without it: the rows are in `metrics.jsonl`.

        Slurm signals the whole step, and wandb's own process dies before this one has saved.
        """
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:  # whatever its pipes, sockets and threads raise: none of it is the training's
            print(
                f"note: wandb failed ({type(error).__name__}) and is left out from here on; all rows are in "
                f"{self._metrics.path}", file=sys.stderr, flush=True,
            )  # fmt: skip
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the files and finish the wandb run, as preempted or failed if there was an error."""
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
    """Take wandb's hook from the interpreter's end: it would print a traceback, where its process died by a signal."""
    import wandb

    with suppress(Exception, SystemExit):  # the second is its process's exit status
        wandb.teardown()


class _JsonLines:
    """A file of JSON lines that grows, and the hash of all that is in it."""

    def __init__(self, path: Path, seen: Mapping[str, tuple[int, str]]) -> None:
        """Cut the file back to what a checkpoint has `seen` of it, (bytes, xxh3) by name; one that is gone stays gone.

        Raises:
            UserError: It does not begin with that.
        """
        self.path = path
        size, digest = seen.get(path.name, (0, ""))
        if size and path.exists() and (path.stat().st_size < size or hash_prefix(path, size) != digest):
            raise UserError(
                f"{path}: its first {size} bytes are not those that the newest checkpoint has seen. Put the file back "
                "from a copy, or delete it: it then begins where the run goes on, and the weights are the same."
            )
        truncate(path, size)
        self._digest = xxh3_128(path.read_bytes() if path.exists() else b"")
        self._file = path.open("ab", buffering=0)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; a crash of this process does not lose it."""
        line = json.dumps(row).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"could not write to {self.path} ({error.strerror}); make room and type the command again: it goes on "
                "from the newest checkpoint."
            ) from error
        self._digest.update(line)

    def state(self) -> tuple[int, str]:
        """Return length and hash, after making the rows so far durable."""
        os.fsync(self._file.fileno())
        return self._file.tell(), self._digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _start_wandb(run: RunDir, settings: TrainConfig, config: Mapping[str, Any], mode: str, run_id: str | None) -> Any:
    point = run.path.name if "=" in run.path.name else ""  # of a sweep: its points are told apart, and stay together
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
    """Start a wandb run; `instead` ends the message if that fails."""
    import wandb

    try:
        return wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            tags=settings.tags,
            mode=mode,  # type: ignore[arg-type]  # a str here, checked by config/checks.py
            # Half a minute for a server that does not answer: a job array should learn of it soon.
            settings=wandb.Settings(silent=mode != "online", init_timeout=30),
            **arguments,
        )
    except wandb.Error as error:
        raise UserError(f"wandb.mode={mode} failed: {error}. {instead}") from error


def log_tables(
    settings: WandbSettings, *, name: str, folder: str, tables: Mapping[str, tuple[list[str], list[list[Any]]]]
) -> None:
    """Send the tables of a report, as (columns, rows) by title, to a wandb run of their own.

    With `mode=auto` and without a key there is nothing to do: the report is on the disk.

    Raises:
        UserError: wandb does not take them.
    """
    mode = wandb_mode(settings)
    waits_for_key = mode == "offline" and settings.mode == "auto" and "WANDB_MODE" not in os.environ
    if mode == "disabled" or waits_for_key:
        return
    import wandb

    instead = "The report is written; wandb.mode=disabled."
    run = _init_wandb(settings, mode, instead, name=name, job_type="evaluate", dir=folder)
    # A table keeps one type a column: rates that were not counted are None among numbers.
    run.log({title: wandb.Table(columns=list(head), data=rows) for title, (head, rows) in tables.items()})
    run.finish()
