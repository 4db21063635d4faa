"""Checkpoints: a folder for other programs (`model/`) and one to resume from (`state/`), complete or absent.

    checkpoints/step-<examples>/
      model/         weights (safetensors) and tokenizer, as `from_pretrained`, vLLM or lm_eval read them
      state/         optimizer (torch.distributed.checkpoint, each process its shards), progress.json, rank<r>.json
      policy.pt      the DPO repo's format, if `checkpoint.policy_pt`
    LATEST -> checkpoints/step-<examples>
    BEST -> checkpoints/step-<examples>        if `checkpoint.keep_best`

The weights are kept once, in `model/`, in their own dtype: what is resumed is what is published, bit for bit.
`state/` is read back only from a run's own directory, never from a `model.archive`: DCP's index is a pickle.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from config.errors import SaidElsewhere, UserError
from config.files import replacing, sync
from config.settings import CheckpointSettings
from trainers.distributed.layout import Layout, gather_objects
from trainers.distributed.sharding import full_parameters
from trainers.run.rng import random_state
from trainers.run.run_dir import RunDir

Unlogged = dict[str, tuple[float, float]]  # metric -> (sum, count)


@dataclass
class RunProgress:
    """Where a run stands, besides weights, optimizer and random numbers. All of it is JSON."""

    examples: int = 0  # seen so far; with the seed, this is the position in the data
    updates: int = 0  # optimizer steps taken
    skipped: int = 0  # steps left out because they were not finite
    evaluated_at: int = -1  # examples seen at the last evaluation; -1: none yet
    evaluation: dict[str, float] = field(default_factory=dict)  # what it measured
    identity: dict[str, str] = field(default_factory=dict)  # what a resumed run must agree on: keys of data, weights
    objective: dict[str, float] = field(default_factory=dict)  # what it keeps from batch to batch
    log: dict[str, Any] = field(default_factory=dict)  # state of the metrics log: lengths of its files, wandb id


def step_of(folder: Path) -> int:
    """Return the examples seen, of a folder `step-<examples>`."""
    return int(folder.name.removeprefix("step-"))


def saved_checkpoints(run_path: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folders = (run_path / "checkpoints").glob("step-*")
    return sorted((folder for folder in folders if folder.name[5:].isdigit()), key=step_of)


def read_progress(folder: Path) -> RunProgress:
    """Read where the run stood at a checkpoint."""
    return RunProgress(**json.loads((folder / "state" / "progress.json").read_text(encoding="utf-8")))


def fsync_tree(folder: Path) -> None:
    """Make every file below a folder, and their names, durable."""
    for parent, _, files in os.walk(folder):
        for name in [*files, "."]:
            sync(Path(parent) / name)


def discard(folder: Path) -> None:
    """Delete a checkpoint so that no crash in between leaves a part of it that looks whole."""
    discarded = folder.with_name(f".{folder.name}.discarded.partial")
    folder.rename(discarded)
    shutil.rmtree(discarded)


def pinned_stager() -> AsyncStager:
    """Return what copies a state from a GPU into page-locked memory, at the speed of the bus.

    That memory is kept for the next checkpoint: to lock it takes longer than to fill it. DCP's default on its own has
    memory that the system may page, and its DefaultStager is good for one checkpoint alone in torch 2.11.
    """
    return BlockingAsyncStager(cache_staged_state_dict=True)


class CheckpointWriter:
    """Writes the checkpoints of a run; `save` copies what is to be written and returns, a thread does the rest.

    In the thread of rank 0 a checkpoint becomes complete: weights, everybody's shards of the optimizer (written by
    them, in threads of theirs), fsync, one rename; only then older ones go. So nothing that kills a run in between
    leaves a directory that looks whole, and there is always the one before.
    """

    def __init__(
        self, run: RunDir, settings: CheckpointSettings, layout: Layout, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Make a process group of its own: the threads talk while the training does."""
        self._run, self._settings, self._layout, self._tokenizer = run, settings, layout, tokenizer
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._stager = pinned_stager() if layout.device.type == "cuda" else None
        self._pending: Future[Any] | None = None

    def save(
        self,
        *,
        policy: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        progress: RunProgress,
        unlogged: Unlogged | None = None,
    ) -> None:
        """Begin `checkpoints/step-<examples>`; every process must come here. Waits for the one before it.

        Raises:
            UserError: that one could not be written: the disk is full or fails. See `wait`.
        """
        self.wait()
        run, layout = self._run, self._layout
        final = run.checkpoints / f"step-{progress.examples}"
        partial = final.with_name(f".{final.name}.partial")
        layout.on_main(lambda: self._begin(partial))
        weights = full_parameters(policy, layout)
        ranks = gather_objects({"random": random_state(), "unlogged": unlogged or {}})
        optimizer_state = {"optimizer": get_optimizer_state_dict(policy, optimizer)}
        shards: Any = dcp.async_save(
            optimizer_state,
            checkpoint_id=partial / "state",
            process_group=self._group,
            async_stager=self._stager,
        )
        if layout.is_main:
            state = {"progress": asdict(progress), **{f"rank{rank}": one for rank, one in enumerate(ranks)}}
            exporter = exporter_of(policy)
            self._pending = self._thread.submit(self._complete, partial, final, exporter, weights, state, shards)
        else:
            self._pending = shards
        if not self._settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            UserError: if the disk is full or fails; the earlier checkpoints are whole, and nothing of this one is left.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointException as error:
            if self._layout.is_main:
                raise
            raise SaidElsewhere(str(error)) from error  # DCP tells every process of a failure in any of them

    def finish(self) -> None:
        """Return when rank 0 has nothing to write any more, in every process: none may end before.

        Raises:
            UserError: as `wait`; in every process, if it is rank 0's.
        """
        if self._layout.is_main:
            self._layout.on_main(self.wait)
        else:
            self.wait()
            self._layout.on_main(lambda: None)

    def _begin(self, partial: Path) -> None:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "state").mkdir(parents=True)
        except OSError as error:
            raise self._failure(partial, error) from error

    def _complete(
        self,
        partial: Path,
        final: Path,
        exporter: PreTrainedModel,
        weights: dict[str, Tensor],
        state: dict[str, Any],
        shards: Future[Any],
    ) -> None:
        """Turn the copies into a complete checkpoint, in the thread of rank 0."""
        try:
            try:
                if self._settings.policy_pt:
                    _save_policy_pt(partial / "policy.pt", weights, state["progress"]["examples"])
                _save_model(partial / "model", exporter, weights, self._tokenizer)
                for name, content in state.items():
                    (partial / "state" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
            finally:
                shards.result()  # nobody writes below `partial` any more, whatever went wrong here
            fsync_tree(partial)
            if final.exists():  # a run that went back to an earlier checkpoint has come here again
                discard(final)
            partial.rename(final)
            _point(self._run.latest, final)
        except (OSError, SafetensorError, CheckpointException) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._failure(final, error) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._retire()

    def _failure(self, final: Path, error: BaseException) -> UserError:
        earlier = [folder for folder in saved_checkpoints(self._run.path) if folder != final]
        kept = f"{earlier[-1]} is whole, and the same command goes on from it" if earlier else "there is no earlier one"
        free = shutil.disk_usage(self._run.path).free / 2**20
        # Some writers say only that a write failed: the free space tells the rest.
        return UserError(
            f"could not save the checkpoint {final} ({reason(error)}; {free:,.0f} MiB free there); what was written of "
            f"it is removed; {kept}. Make room, or set checkpoint.keep_last=1 or a larger checkpoint.every_examples, "
            "and type the command again."
        )

    def _retire(self) -> None:
        """Point BEST at the best checkpoint, and delete those that neither `keep_last` nor `keep_best` keeps."""
        folders = saved_checkpoints(self._run.path)
        keep = set(folders if self._settings.keep_last is None else folders[-self._settings.keep_last :])
        if self._settings.keep_best is not None:
            best = best_checkpoint(folders, self._settings.keep_best)
            if best is not None:
                _point(self._run.best, best)
                keep.add(best)
        for folder in folders:
            if folder not in keep:
                discard(folder)


def lower_is_better(metric: str) -> bool:
    """Return whether a metric is best when small, as losses are; rewards, accuracies, log-probabilities are not."""
    return "loss" in metric or metric.startswith("nll")


def best_checkpoint(folders: list[Path], metric: str) -> Path | None:
    """Return the checkpoint whose own evaluation was best, the later of equals; None if none was taken at one."""
    scores = {}
    for folder in folders:
        progress = read_progress(folder)
        if progress.evaluated_at == progress.examples and metric in progress.evaluation:
            value = progress.evaluation[metric]
            scores[folder] = (-value if lower_is_better(metric) else value, progress.examples)
    return max(scores, key=lambda folder: scores[folder], default=None)


def reason(error: BaseException) -> str:
    """Return the first line of an error; of DCP's, the one of the process that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {type(cause).__name__}: {reason(cause)}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def plain_class(policy: PreTrainedModel) -> Any:
    """Return the class of a policy as it was before `fully_shard`, which puts a class of its own in front."""
    return next(kind for kind in type(policy).__mro__ if not issubclass(kind, FSDPModule))


def exporter_of(policy: PreTrainedModel) -> PreTrainedModel:
    """Return the policy without weights and layout, to call `save_pretrained` on while the policy trains."""
    with torch.device("meta"):
        exporter = plain_class(policy)(copy.deepcopy(policy.config)).to(policy.dtype)
    exporter.generation_config = copy.deepcopy(policy.generation_config)
    return exporter


def _save_model(
    folder: Path, exporter: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    transformers_logging.disable_progress_bar()  # the run has a line of its own
    try:
        exporter.save_pretrained(folder, state_dict=weights)
    finally:
        transformers_logging.enable_progress_bar()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _save_policy_pt(path: Path, weights: dict[str, Tensor], examples: int) -> None:
    with path.open("wb") as file:  # an open file, so that a full disk is an OSError
        torch.save({"step_idx": examples, "state": weights, "metrics": {}}, file)


def _point(link: Path, target: Path) -> None:
    """Make a link of the run directory name a checkpoint; a reader sees the old or the new one."""
    with replacing(link) as partial:
        partial.unlink(missing_ok=True)  # of a process that was killed here
        partial.symlink_to(target.relative_to(link.parent))
    for folder in (target.parent, link.parent):
        sync(folder)
