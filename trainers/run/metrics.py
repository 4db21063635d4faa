"""Metrics: summed on the device, averaged once per log interval, written to `metrics.jsonl` and wandb.

The names are the DPO repo's (`loss/train`, `rewards_eval/accuracies`, ...); others stand beside them. The x-axis is
`counters/examples`, so that runs with different batch sizes lie over each other. Nothing but this file knows wandb.
"""

from __future__ import annotations

import json
import netrc
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO
from urllib.parse import urlparse

import torch
from torch import Tensor

from config.errors import UserError
from config.settings import TrainConfig, WandbSettings
from trainers.distributed.layout import gather_from_processes
from trainers.distributed.preemption import Preempted
from trainers.run.run_dir import RunDir, truncate


class MetricSums:
    """Sums and counts of named quantities, each where it was computed: to add one copies nothing, waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        """Begin empty; on `device` the sums of all processes will meet."""
        self._device = device
        self._sums: dict[str, tuple[Tensor | float, float]] = {}  # name -> sum (a tensor: float64), count
        self._peaks: dict[str, float] = {}

    def __len__(self) -> int:
        """How many quantities there are."""
        return len(self._sums)

    def add(self, name: str, total: Tensor | float, count: float) -> None:
        """Add a sum (scalar) over `count` things to a quantity's mean."""
        if isinstance(total, Tensor):
            total = total.detach().double()
        so_far, counted = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (so_far + total, counted + count)

    def peak(self, name: str, value: float) -> None:
        """Notes a quantity whose largest value over steps and processes is what matters."""
        self._peaks[name] = max(value, self._peaks.get(name, value))

    def state(self) -> dict[str, tuple[float, float]]:
        """Return this process's sums, as JSON."""
        return {name: (float(total), count) for name, (total, count) in self._sums.items()}

    def load(self, state: Mapping[str, tuple[float, float]]) -> None:
        """Put `state()` back."""
        self._sums = {name: (total, count) for name, (total, count) in state.items()}

    def means(self) -> dict[str, float]:
        """The mean of every quantity over all that was added, by all processes, in one collective; then empty again.

        Every process must come here, with the same names.
        """
        if not self._sums:
            return {}
        names, peaks = sorted(self._sums), sorted(self._peaks)
        pairs = [*(self._sums[name] for name in names), *((self._peaks[name], 0.0) for name in peaks)]
        table = torch.tensor([[0.0, count] for _, count in pairs], dtype=torch.float64, device=self._device)
        for row, (total, _) in zip(table, pairs, strict=True):
            row[0] = total
        gathered = gather_from_processes(table).cpu()
        self._sums, self._peaks = {}, {}
        totals = gathered[:, : len(names)].sum(0).tolist()
        means = {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}
        return {**means, **dict(zip(peaks, gathered[:, len(names) :, 0].amax(0).tolist(), strict=True))}


def peak_memory_gib(device: torch.device) -> float:
    """The most memory that this process has held: the allocator's on a GPU, resident memory on a CPU. In GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB here


def wandb_mode(settings: WandbSettings) -> str:
    """`online`, `offline` or `disabled`; `auto` is online where a key is at hand. Touches no network.

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
        self,
        run: RunDir,
        settings: TrainConfig,
        config: Mapping[str, Any],
        state: Mapping[str, Any],
        *,
        active: bool = True,
    ) -> None:
        """Opens them where `state` (of the checkpoint that is resumed, or empty) left off: later rows are dropped.

        One that is not active, that of a process beside the first, writes nothing.
        """
        self._active = active
        self._wandb: Any = None
        if not active:
            return
        for path, key in ((run.metrics, "metrics_bytes"), (run.samples, "samples_bytes")):
            truncate(path, state.get(key, 0))
        self._settings = settings
        self._metrics = run.metrics.open("a", encoding="utf-8")
        self._samples = run.samples.open("a", encoding="utf-8")
        mode = "disabled" if settings.debug else wandb_mode(settings.wandb)
        if mode != "disabled":
            self._wandb = _start_wandb(run, settings, config, mode, state.get("wandb_id"))

    def write(self, values: Mapping[str, float]) -> None:
        """One row of metrics; `counters/examples` must be among them. Durable against a crash of this process."""
        if not self._active:
            return
        _append(self._metrics, values)
        if self._wandb is not None:
            self._wandb.log(dict(values))

    def write_samples(self, rows: list[dict[str, Any]], examples: int) -> None:
        """Rows of text, each with the counter; to wandb only if `log_text`."""
        if not self._active:
            return
        for row in rows:
            _append(self._samples, {"counters/examples": examples, **row})
        if self._wandb is not None and self._settings.log_text and rows:
            import wandb

            columns: list[str | int] = list(rows[0])
            table = wandb.Table(columns=columns, data=[list(row.values()) for row in rows])
            self._wandb.log({"samples": table, "counters/examples": examples})

    def state(self) -> dict[str, Any]:
        """What a checkpoint must know to go on writing after this row; makes the rows so far durable."""
        if not self._active:
            return {}
        for file in (self._metrics, self._samples):
            os.fsync(file.fileno())
        lengths = {"metrics_bytes": self._metrics.tell(), "samples_bytes": self._samples.tell()}
        return lengths if self._wandb is None else {**lengths, "wandb_id": self._wandb.id}

    def __enter__(self) -> Self:
        """The log itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the files and finishes the wandb run, as preempted or failed if there was an error."""
        if not self._active:
            return
        self._metrics.close()
        self._samples.close()
        if self._wandb is not None:
            if kind is Preempted:
                self._wandb.mark_preempting()
            self._wandb.finish(exit_code=0 if error is None else 1)


def _append(file: TextIO, row: Mapping[str, Any]) -> None:
    try:
        file.write(json.dumps(row) + "\n")
        file.flush()
    except OSError as error:
        raise UserError(
            f"could not write to {file.name} ({error.strerror}); make room and type the command again: it goes on "
            "from the newest checkpoint."
        ) from error


def _start_wandb(run: RunDir, settings: TrainConfig, config: Mapping[str, Any], mode: str, run_id: str | None) -> Any:
    started = _init_wandb(
        settings.wandb, mode, "Use wandb.mode=offline and `wandb sync` later.", name=settings.exp_name,
        config=dict(config), dir=str(run.path), id=run_id, resume="allow" if mode == "online" else None,
    )  # fmt: skip
    started.define_metric("counters/examples")
    started.define_metric("*", step_metric="counters/examples")
    return started


def _init_wandb(settings: WandbSettings, mode: str, instead: str, **arguments: Any) -> Any:
    """A wandb run; `instead` ends the message of one that cannot be had."""
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
    """Sends the tables of a report, as (columns, rows) by title, to a wandb run of their own.

    With `mode=auto` and no key at hand there is nothing to do: the report lies on the disk.

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
