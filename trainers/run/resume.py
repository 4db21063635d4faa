"""Resuming from a checkpoint of the run: weights, optimizer, random generators, and metric sums not yet logged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PreTrainedModel

from config.checksums import everything, find_damage
from config.errors import UserError
from config.paths import saved_checkpoints
from trainers.distributed.layout import Layout, gather_objects
from trainers.distributed.sharding import fill_model, full_state
from trainers.lora import adapter_of, read_adapter
from trainers.run.checkpoint import Unlogged, plain_class, reason
from trainers.run.data_only import load_data_only
from trainers.run.run_dir import RunDir
from trainers.run.saved import RunProgress, read_progress, unusable
from trainers.run.state import plain_state, set_random_state, wrapped_state

PROGRESS = "state/progress.json"


def is_finished(run: RunDir, total_examples: int, *, data: str) -> bool:
    """Return whether the newest checkpoint has seen all the data with this key and was evaluated.

    Raises:
        UserError: The checkpoint is damaged or belongs to another run.
    """
    newest = saved_checkpoints(run.path)[-1:]
    if not newest:
        return False
    _require_whole(run, newest[0], {PROGRESS})
    progress = read_progress(newest[0])
    at_end = progress.examples >= total_examples and progress.evaluated_at == progress.examples
    if not at_end or progress.identity.get("data") != data:
        return False
    _require_whole(run, newest[0], None)  # check all files: for a finished run nothing else will read them
    return True


def _require_whole(run: RunDir, folder: Path, files: set[str] | None) -> None:
    """Raise a UserError unless a checkpoint is this run's and the contents of `files` (None: all) are intact."""
    contents = everything if files is None else files.__contains__
    damage = find_damage(folder, owner=run.owner(folder), contents=contents)
    if damage:
        raise unusable(folder, damage)


def load_checkpoint(
    run: RunDir, *, policy: PreTrainedModel, optimizer: torch.optim.Optimizer, layout: Layout,
    shards: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> tuple[RunProgress, Unlogged] | None:  # fmt: skip
    """Put the run's newest checkpoint into policy, optimizer and random generators; return None if there is none.

    The tensors of `shards` are filled in place, too.

    A collective: every process must call it. The checkpoint may come from another layout or number of processes; then
    additional processes keep their random state, and metric sums that were not logged yet go to rank 0.

    Raises:
        UserError: if a part of it is missing, damaged, of another run, or does not fit the model.
    """
    newest = layout.on_main(lambda: _newest(run))
    if newest is None:
        return None
    # Each process hashes a share of the files: rank 0 alone would need as long for that as all of them need to load.
    damages = gather_objects(find_damage(newest, owner=None, part=(layout.rank, layout.world_size)))
    if any(damages):
        raise unusable(newest, next(filter(None, damages)))
    state = newest / "state"
    try:
        progress = read_progress(newest)
        ranks = [json.loads((state / f"rank{rank}.json").read_text()) for rank in range(len([*state.glob("rank*")]))]
        if (adapter := adapter_of(policy)) is None:
            load_weights(policy, newest / "model", layout)
        else:  # the base is already loaded
            stored = layout.main_only(lambda: read_adapter(newest / "adapter", policy))
            fill_model(policy, stored or {}, layout, adapter.names.values())
        own_state = get_optimizer_state_dict(policy, optimizer)
        sharded_state: dict[str, Any] = {"optimizer": plain_state(own_state), **(shards or {})}
        load_data_only(sharded_state, state)
    except UserError:  # the weights are readable but do not fit
        raise
    except (OSError, ValueError, TypeError, SafetensorError, CheckpointException) as error:
        raise unusable(newest, reason(error)) from error
    set_optimizer_state_dict(policy, optimizer, wrapped_state(sharded_state["optimizer"], own_state))
    if layout.rank < len(ranks):
        set_random_state(ranks[layout.rank]["random"])
    return progress, _own_part([rank["unlogged"] for rank in ranks], layout)


def _newest(run: RunDir) -> Path | None:
    """Return the newest checkpoint, or None; raise a UserError if it is another run's or its file sizes are wrong."""
    newest = saved_checkpoints(run.path)[-1:]
    if not newest:
        return None
    _require_whole(run, newest[0], set())
    return newest[0]


def _own_part(unlogged: list[Unlogged], layout: Layout) -> Unlogged:
    """Return this process's sums; if the number of processes changed, rank 0 gets all and the others zeros."""
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

    `from_pretrained` reads them, because some architectures (GPT-NeoX) store tensors under other names.

    Raises:
        UserError: for missing, unexpected or misshapen tensors.
    """
    stored = layout.main_only(lambda: _read_weights(policy, folder))
    fill_model(policy, full_state(stored) if stored is not None else {}, layout)


def _read_weights(policy: PreTrainedModel, folder: Path) -> PreTrainedModel:
    try:
        stored, report = plain_class(policy).from_pretrained(
            folder, config=policy.config, dtype=policy.dtype, local_files_only=True, output_loading_info=True,
            trust_remote_code=False,
        )  # fmt: skip
    except RuntimeError as error:  # a tensor of another shape
        raise UserError(f"the weights in {folder} do not fit the model: {error}") from error
    problems = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        counts = "; ".join(
            f"{len(keys)} {kind.replace('_', ' ')} ({keys[0]}, ...)" for kind, keys in problems.items() if keys
        )
        raise UserError(f"the weights in {folder} do not fit the model: {counts}.")
    return stored
