"""Going back to a checkpoint of the run: weights, optimizer, random generators, and sums that were not logged yet."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel

from config.errors import UserError
from trainers.distributed.layout import Layout
from trainers.distributed.sharding import fill_model, full_state
from trainers.run.checkpoint import RunProgress, Unlogged, plain_class, read_progress, reason, saved_checkpoints
from trainers.run.rng import set_random_state
from trainers.run.run_dir import RunDir


def is_finished(run: RunDir, total_examples: int, *, data: str) -> bool:
    """Return whether the newest checkpoint is the end of a run over the data with this key: seen whole, evaluated."""
    newest = saved_checkpoints(run.path)[-1:]
    if not newest:
        return False
    progress = read_progress(newest[0])
    at_end = progress.examples >= total_examples and progress.evaluated_at == progress.examples
    return at_end and progress.identity.get("data") == data


def load_checkpoint(
    run: RunDir, *, policy: PreTrainedModel, optimizer: torch.optim.Optimizer, layout: Layout
) -> tuple[RunProgress, Unlogged] | None:
    """Put the run's newest checkpoint into policy, optimizer and random generators; return None if there is none.

    Every process must come here. The checkpoint may be of another layout and another number of processes. The random
    generators of additional processes stay as they are; sums that were not logged yet go to rank 0.

    Raises:
        UserError: if a part of it is missing or does not fit the model.
    """
    newest = layout.on_main(lambda: saved_checkpoints(run.path)[-1:])
    if not newest:
        return None
    state = newest[0] / "state"
    try:
        progress = read_progress(newest[0])
        ranks = [json.loads((state / f"rank{rank}.json").read_text()) for rank in range(len([*state.glob("rank*")]))]
        load_weights(policy, newest[0] / "model", layout)
        optimizer_state = {"optimizer": get_optimizer_state_dict(policy, optimizer)}
        dcp.load(optimizer_state, checkpoint_id=state)
    except UserError:  # the weights can be read, and do not fit
        raise
    except (OSError, ValueError, TypeError, SafetensorError, CheckpointException) as error:
        raise UserError(
            f"checkpoint {newest[0]} cannot be read ({reason(error)}); delete that folder to go on from the one before "
            "it."
        ) from error
    set_optimizer_state_dict(policy, optimizer, optimizer_state["optimizer"])
    if layout.rank < len(ranks):
        set_random_state(ranks[layout.rank]["random"])
    return progress, _own_part([rank["unlogged"] for rank in ranks], layout)


def _own_part(unlogged: list[Unlogged], layout: Layout) -> Unlogged:
    """Return this process's sums; after another number of processes, all in rank 0 and zeros elsewhere."""
    if len(unlogged) == layout.world_size:
        return unlogged[layout.rank]
    sums: Unlogged = {}
    for one in unlogged if layout.is_main else []:
        for name, (total, count) in one.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + total, before[1] + count)
    return sums or {name: (0.0, 0.0) for one in unlogged for name in one}


def load_weights(policy: PreTrainedModel, folder: Path, layout: Layout) -> None:
    """Copy the weights of an HF folder into a model of the same architecture and dtype; rank 0 reads them.

    `from_pretrained` does that: some architectures store tensors under other names than their own (GPT-NeoX).

    Raises:
        UserError: for tensors that are missing, not asked for, or of another shape.
    """
    stored = layout.main_only(lambda: _read_weights(policy, folder))
    fill_model(policy, full_state(stored) if stored is not None else {}, layout)


def _read_weights(policy: PreTrainedModel, folder: Path) -> PreTrainedModel:
    try:
        stored, report = plain_class(policy).from_pretrained(
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
    return stored
