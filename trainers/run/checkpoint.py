"""Checkpoints: `model/` for other programs and `state/` for resuming; a checkpoint is complete or absent.

    checkpoints/step-<examples>/
      adapter/       with `model.lora`: peft's folder, and base.json, which identifies the base
      model/         weights (safetensors), tokenizer and model card, as `from_pretrained`, vLLM or lm_eval read them;
                     with `model.lora`, base and adapter merged, and only if `checkpoint.merge`
      state/         optimizer shards (torch.distributed.checkpoint), progress.json, rank<r>.json; the weights of the
                     average (`ema.decay`) or renewed reference; the policy's own weights, if `model/` is the average
      policy.pt      the DPO repo's format, if `checkpoint.policy_pt`
      checksums.xxh3.json   size and hash of every file, and the owner of the checkpoint
    LATEST -> checkpoints/step-<examples>
    BEST -> checkpoints/step-<examples>        if `checkpoint.keep_best`

The trained weights are stored once, in `model/` or `adapter/`, in their own dtype: a run resumes from exactly the
weights that are published. The exception is `ema.save`, which publishes the average.
`state/` is read back only from a run's own directory, never from a `model.archive`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
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
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from config.checksums import CHECKSUMS, write_checksums
from config.errors import SaidElsewhere, UserError, first_line
from config.files import sync, write_text
from config.paths import saved_checkpoints
from config.settings import CheckpointSettings
from trainers.distributed.layout import Layout, gather_objects
from trainers.distributed.sharding import full_parameters
from trainers.lora import Adapter, adapter_of, merged, save_adapter
from trainers.run.model_card import render_model_card
from trainers.run.run_dir import RunDir, remove
from trainers.run.saved import RunProgress, best_checkpoint, discard, point
from trainers.run.state import plain_state, random_state
from trainers.run.state_writer import HashingWriter

Unlogged = dict[str, tuple[float, float]]  # metric -> (sum, count)


def fsync_tree(folder: Path) -> None:
    """Call fsync on every file and directory below a folder."""
    for parent, _, files in os.walk(folder):
        for name in [*files, "."]:
            with suppress(FileNotFoundError):  # the checksums' temporary file, renamed meanwhile
                sync(Path(parent) / name)


def pinned_stager() -> AsyncStager:
    """Return a DCP stager that copies a state from the GPU into pinned memory, at the speed of the bus.

    It keeps the pinned memory for the next checkpoint, because pinning takes longer than copying. Why not DCP's
    default? It stages into pageable memory; and its DefaultStager only works for one checkpoint in torch 2.11. This
    stager does not refresh tensors inside lists. The only one in an optimizer's state is torchao's learning rate, which
    every step sets again.
    """
    return BlockingAsyncStager(cache_staged_state_dict=True)


class CheckpointWriter:
    """Writes the checkpoints of a run; `save` copies the state to host memory and returns, a thread does the rest.

    Every process writes its optimizer shards in a thread of its own. The thread of rank 0 writes the weights, waits for
    the shards, calls fsync and renames the directory; only then does it delete older checkpoints. So a run killed at
    any time leaves no directory that only looks complete, and the previous checkpoint is still there.
    """

    def __init__(
        self, run: RunDir, settings: CheckpointSettings, layout: Layout, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Create a separate process group, because the threads communicate at the same time as the training."""
        self._run, self._settings, self._layout, self._tokenizer = run, settings, layout, tokenizer
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._stager = pinned_stager() if layout.device.type == "cuda" else None
        self._pending: Future[Any] | None = None
        self._exporter: PreTrainedModel | None = None  # reused by later checkpoints: its layers take time to build

    def save(
        self, *, policy: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: RunProgress,
        unlogged: Unlogged | None = None, shards: Mapping[str, Mapping[str, Tensor]] | None = None,
        published: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        """Begin `checkpoints/step-<examples>`; every process must come here. Waits for the one before it.

        `shards` go into `state/` with the optimizer; within `published` the policy has the weights for `model/`.

        Raises:
            UserError: the previous checkpoint could not be written, because the disk is full or fails. See `wait`.
        """
        self.wait()
        run, layout = self._run, self._layout
        final = run.checkpoints / f"step-{progress.examples}"
        partial = final.with_name(f".{final.name}.partial")
        layout.on_main(lambda: self._begin(partial))
        adapter = adapter_of(policy)
        only = adapter.names.values() if adapter is not None and not self._settings.merge else None
        with published():
            weights = full_parameters(policy, layout, only)
        ranks = gather_objects({"random": random_state(), "unlogged": unlogged or {}})
        optimizer_state = plain_state(get_optimizer_state_dict(policy, optimizer))
        sharded_state = {"optimizer": optimizer_state, **(shards or {})}
        writer = HashingWriter(partial / "state")
        written: Any = dcp.async_save(
            sharded_state, storage_writer=writer, process_group=self._group, async_stager=self._stager
        )
        if layout.is_main:
            state = {"progress": asdict(progress), **{f"rank{rank}": one for rank, one in enumerate(ranks)}}
            self._exporter = self._exporter or exporter_of(policy)
            parts = (self._exporter, adapter, weights, state, written, writer.digests)
            self._pending = self._thread.submit(self._complete, partial, final, *parts)
        else:
            self._pending = written
        if not self._settings.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait for this process's pending checkpoint.

        Raises:
            UserError: if the disk is full or fails. Earlier checkpoints are intact, and this one was removed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointException as error:
            if self._layout.is_main:
                raise
            raise SaidElsewhere(str(error)) from error  # DCP reports a failure in all processes

    def finish(self) -> None:
        """Wait, in every process, until rank 0 has finished writing: no process may exit before that.

        Raises:
            UserError: as `wait`; in every process, if rank 0 failed.
        """
        if self._layout.is_main:
            self._layout.on_main(self.wait)
        else:
            self.wait()
            self._layout.on_main(lambda: None)

    def _begin(self, partial: Path) -> None:
        try:
            if partial.is_symlink() or partial.exists():
                remove(partial)
            (partial / "state").mkdir(parents=True)
        except OSError as error:
            raise self._failure(partial, error) from error

    def _complete(
        self, partial: Path, final: Path, exporter: PreTrainedModel, adapter: Adapter | None,
        weights: dict[str, Tensor], state: dict[str, Any], shards: Future[Any], digests: dict[Path, str],
    ) -> None:  # fmt: skip
        """Turn the copies into a complete checkpoint, in the thread of rank 0."""
        try:
            try:
                if adapter is not None:
                    base = state["progress"]["identity"].get("base")
                    _save_adapter(partial / "adapter", exporter, adapter, weights, base, self._tokenizer)
                if adapter is not None and self._settings.merge:
                    weights, adapter = merged(exporter, adapter, weights), None
                if adapter is None and self._settings.policy_pt:
                    _save_policy_pt(partial / "policy.pt", weights, state["progress"]["examples"])
                if adapter is None:
                    _save_model(partial / "model", exporter, weights, self._tokenizer)
                if self._run.config:
                    card = render_model_card(self._run.config, self._run.manifest, state["progress"])
                    write_text(partial / ("model" if adapter is None else "adapter") / "README.md", card)
                for name, content in state.items():
                    (partial / "state" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
            finally:
                shards.result()  # even after an error above: all writers must stop before `partial` is removed
            _readable_like(partial / "state" / "progress.json", partial)
            with ThreadPoolExecutor(max_workers=1) as pool:  # fsync in a thread, at the same time as hashing
                synced = pool.submit(fsync_tree, partial)
                write_checksums(partial, owner=self._run.owner(final), known=digests)
                synced.result()
            for written in (partial / CHECKSUMS, partial):
                sync(written)
            # Exists if the run resumed from an earlier checkpoint and reached this step again.
            if final.is_symlink() or final.exists():
                discard(final)
            partial.rename(final)
            point(self._run.latest, final)
        except (OSError, SafetensorError, CheckpointException) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._failure(final, error) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._retire()

    def _failure(self, final: Path, error: BaseException) -> UserError:
        earlier = [folder for folder in saved_checkpoints(self._run.path) if folder != final]
        kept = f"{earlier[-1]} is intact, and the run resumes from it" if earlier else "there is no earlier one"
        free = shutil.disk_usage(self._run.path).free / 2**20
        # Include the free space, because some writers only report that a write failed.
        return UserError(
            f"could not save the checkpoint {final} ({reason(error)}; {free:,.0f} MiB free there). The unfinished "
            f"checkpoint was removed; {kept}. Free some space, or set checkpoint.keep_last=1 or a larger "
            "checkpoint.every_examples, and rerun the command."
        )

    def _retire(self) -> None:
        """Point BEST at the best checkpoint, and delete checkpoints that neither `keep_last` nor `keep_best` keeps."""
        folders = saved_checkpoints(self._run.path)
        keep = set(folders if self._settings.keep_last is None else folders[-self._settings.keep_last :])
        best = best_checkpoint(folders, self._settings.keep_best)
        if best is not None:
            point(self._run.best, best)
            keep.add(best)
        for folder in folders:
            if folder not in keep:
                discard(folder)


def reason(error: BaseException) -> str:
    """Return the first line of an error; for DCP's, that of the failed process with the lowest rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items())
        return f"rank {rank}: {type(cause).__name__}: {reason(cause)}"
    return first_line(error)


def plain_class(policy: PreTrainedModel) -> Any:
    """Return the class of a policy without the FSDP subclass that `fully_shard` puts in front."""
    return next(kind for kind in type(policy).__mro__ if not issubclass(kind, FSDPModule))


def exporter_of(policy: PreTrainedModel) -> PreTrainedModel:
    """Return an unsharded copy of the policy on the meta device, to call `save_pretrained` on during training."""
    with torch.device("meta"):
        exporter = plain_class(policy)(copy.deepcopy(policy.config)).to(policy.dtype)
    exporter.generation_config = copy.deepcopy(policy.generation_config)
    return exporter


def _save_model(
    folder: Path, exporter: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    transformers_logging.disable_progress_bar()  # the run shows its own progress line
    decoding, exporter.generation_config = exporter.generation_config, GenerationConfig()
    try:
        exporter.save_pretrained(folder, state_dict=weights)
    finally:
        transformers_logging.enable_progress_bar()
        exporter.generation_config = decoding
    # `save_pretrained` refuses values that published configs contain, such as a temperature without sampling.
    decoding.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _save_adapter(
    folder: Path, exporter: PreTrainedModel, adapter: Adapter, weights: dict[str, Tensor], base_weights: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:  # fmt: skip
    config = json.loads(exporter.config.to_json_string(use_diff=False))
    save_adapter(folder, adapter, weights, base={"config": config, "weights": base_weights})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _readable_like(example: Path, folder: Path) -> None:
    """Give all files of a folder the permissions of `example`: safetensors makes files that only the owner can read."""
    mode = example.stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _save_policy_pt(path: Path, weights: dict[str, Tensor], examples: int) -> None:
    with path.open("wb") as file:  # an open file, so that a full disk raises an OSError
        torch.save({"step_idx": examples, "state": weights, "metrics": {}}, file)
