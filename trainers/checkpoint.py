"""Checkpoints: a folder for the world (`model/`) and one for going on (`state/`), complete or not there at all.

    checkpoints/step-<examples>/
      model/         weights (safetensors) and tokenizer, as `from_pretrained`, vLLM or lm_eval read them
      state/         optimizer (torch.distributed.checkpoint), progress.json, rng_rank<r>.json
      policy.pt      the DPO repo's format, if `checkpoint.policy_pt`
    LATEST -> checkpoints/step-<examples>

The weights are kept once, in `model/`, in their own dtype: what is resumed is what is published, bit for bit.
`state/` is read back only from a run's own directory, never from a `model.archive`: DCP's index is a pickle.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from config.errors import UserError
from config.settings import CheckpointSettings
from trainers.run_dir import RunDir


@dataclass
class Progress:
    """Where a run stands, besides weights, optimizer and random numbers. All of it is JSON."""

    examples: int = 0  # seen so far; with the seed, this is the position in the data
    updates: int = 0  # optimizer steps taken
    skipped: int = 0  # steps left out because they were not finite
    evaluated_at: int = -1  # examples seen at the last evaluation; -1: none yet
    identity: dict[str, str] = field(default_factory=dict)  # what a resumed run must agree on: keys of data, weights
    unlogged: dict[str, tuple[float, float]] = field(default_factory=dict)  # metric -> (sum, count), not logged yet
    log: dict[str, Any] = field(default_factory=dict)  # state of the metrics log: lengths of its files, wandb id


def step_of(folder: Path) -> int:
    """The examples seen, of a folder `step-<examples>`."""
    return int(folder.name.removeprefix("step-"))


def saved_checkpoints(run_path: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = (run_path / "checkpoints").glob("step-*")
    return sorted((folder for folder in folders if folder.name[5:].isdigit()), key=step_of)


def resolve_checkpoint(path: Path) -> Path:
    """The HF folder with the weights of a run (its newest), of a checkpoint, or of such a folder itself.

    Raises:
        UserError: saying what was looked for.
    """
    newest = saved_checkpoints(path)[-1:]
    for folder in [path / "LATEST" / "model", *(checkpoint / "model" for checkpoint in newest), path / "model", path]:
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"{path} holds no weights: it is neither a run (LATEST/model), nor a checkpoint (model/), nor an HF folder "
        "(config.json)" + ("." if path.exists() else "; there is no such path.")
    )


def fsync_tree(folder: Path) -> None:
    """Makes every file below a folder, and the names of them, durable."""
    for parent, _, files in os.walk(folder):
        for name in [*files, "."]:
            descriptor = os.open(Path(parent) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def discard(folder: Path) -> None:
    """Deletes a checkpoint so that no crash in between leaves a part of it that looks whole."""
    discarded = folder.with_name(f".{folder.name}.discarded.partial")
    folder.rename(discarded)
    shutil.rmtree(discarded)


def save_checkpoint(
    run: RunDir,
    *,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    settings: CheckpointSettings,
) -> Path:
    """Writes `checkpoints/step-<examples>`, points LATEST at it, then deletes what `keep_last` does not keep.

    Raises:
        UserError: if the disk is full or fails; the earlier checkpoints are whole, and nothing of this one is left.
    """
    final = run.checkpoints / f"step-{progress.examples}"
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)
        _save_model(partial / "model", policy, tokenizer)
        _save_state(partial / "state", policy, optimizer, progress)
        if settings.policy_pt:
            _save_policy_pt(partial / "policy.pt", policy, progress)
        fsync_tree(partial)
        if final.exists():  # a run that went back to an earlier checkpoint has come here again
            discard(final)
        partial.rename(final)
        _point_latest(run, final)
    except (OSError, SafetensorError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, CheckpointException):
            for cause, _ in error.failures.values():  # Ctrl-C in mid-write comes wrapped like a failed write
                if isinstance(cause, KeyboardInterrupt):
                    raise cause from None
        raise UserError(_save_failure(run, final, error)) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if settings.keep_last is not None:
        for folder in saved_checkpoints(run.path)[: -settings.keep_last]:
            discard(folder)
    return final


def _save_failure(run: RunDir, final: Path, error: BaseException) -> str:
    earlier = [folder for folder in saved_checkpoints(run.path) if folder != final]
    kept = f"{earlier[-1]} is whole, and the same command goes on from it" if earlier else "there is no earlier one"
    free = shutil.disk_usage(run.path).free / 2**20
    # Some writers say only that a write failed: the free space tells the rest.
    return (
        f"could not save the checkpoint {final} ({str(error).splitlines()[0] if str(error) else type(error).__name__}; "
        f"{free:,.0f} MiB free there); what was written of it is removed; {kept}. Make room, or set "
        "checkpoint.keep_last=1 or a larger checkpoint.every_examples, and type the command again."
    )


def _save_model(folder: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    transformers_logging.disable_progress_bar()  # the run has a line of its own
    try:
        policy.save_pretrained(folder)
    finally:
        transformers_logging.enable_progress_bar()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _save_state(folder: Path, policy: PreTrainedModel, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    dcp.save({"optimizer": get_optimizer_state_dict(policy, optimizer)}, checkpoint_id=folder)
    (folder / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    (folder / "rng_rank0.json").write_text(json.dumps(random_state()), encoding="utf-8")


def _save_policy_pt(path: Path, policy: PreTrainedModel, progress: Progress) -> None:
    with path.open("wb") as file:  # an open file, so that a full disk is an OSError
        torch.save({"step_idx": progress.examples, "state": policy.state_dict(), "metrics": {}}, file)


def _point_latest(run: RunDir, target: Path) -> None:
    link = run.latest.with_name(".LATEST.partial")
    link.unlink(missing_ok=True)
    link.symlink_to(target.relative_to(run.path))
    os.replace(link, run.latest)
    for folder in (run.checkpoints, run.path):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load_checkpoint(run: RunDir, *, policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Puts the run's newest checkpoint into policy, optimizer and the random generators; None if there is none.

    Raises:
        UserError: if a part of it is missing or does not fit the model.
    """
    newest = saved_checkpoints(run.path)[-1:]
    if not newest:
        return None
    state = newest[0] / "state"
    try:
        progress = Progress(**json.loads((state / "progress.json").read_text(encoding="utf-8")))
        rng = json.loads((state / "rng_rank0.json").read_text(encoding="utf-8"))
        load_weights(policy, newest[0] / "model")
        optimizer_state = {"optimizer": get_optimizer_state_dict(policy, optimizer)}
        dcp.load(optimizer_state, checkpoint_id=state)
    except (OSError, ValueError, TypeError, SafetensorError, CheckpointException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"checkpoint {newest[0]} cannot be read ({str(error).splitlines()[0] if str(error) else error!r}); delete "
            "that folder to go on from the one before it."
        ) from error
    set_optimizer_state_dict(policy, optimizer, optimizer_state["optimizer"])
    set_random_state(rng)
    return progress


def load_weights(policy: PreTrainedModel, folder: Path) -> None:
    """Copies the weights of an HF folder into a model of the same architecture and dtype.

    By way of `from_pretrained`: tensors may be stored under other names than the model's own (GPT-NeoX is one).

    Raises:
        UserError: for tensors that are missing, not asked for, or of another shape.
    """
    reader: Any = type(policy)  # typed as returning a model only
    try:
        stored, report = reader.from_pretrained(
            folder, config=policy.config, dtype=policy.dtype, local_files_only=True, output_loading_info=True
        )
    except RuntimeError as error:  # a tensor of another shape
        raise UserError(f"the weights in {folder} do not fit the model: {error}") from error
    problems = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        counts = "; ".join(
            f"{len(keys)} {kind.replace('_', ' ')} ({keys[0]}, ...)" for kind, keys in problems.items() if keys
        )
        raise UserError(f"the weights in {folder} do not fit the model: {counts}.")
    policy.load_state_dict(stored.state_dict())


def random_state() -> dict[str, Any]:
    """The state of this process's random generators, as JSON."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts `random_state()` back; a GPU's generator is left alone where the state comes from a machine without one."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def truncate(path: Path, length: int) -> None:
    """Cuts a file that a checkpoint had seen `length` bytes of back to them; a file that is gone stays gone."""
    with suppress(FileNotFoundError):
        if path.stat().st_size > length:
            os.truncate(path, length)
