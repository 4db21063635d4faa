"""Log-probabilities of the reference model: computed once, by the policy itself before its first step, and kept.

During training no reference model is in memory. The cache is a file found by its content: weights, token rows, dtype,
kind of device, and the versions of the code that computes them. Points of a sweep that start together share it: one
builds, the others wait. The weights are always the run's *initial* ones: callers load those on a resumed run, too, so
that a cache that was deleted meanwhile is never rebuilt from trained weights.

Under several processes each computes its part of the micro-batches, which are cut as one process would cut them: the
file is the same whatever their number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
import xxhash
from torch import Tensor

from config.errors import UserError
from trainers.data.batching import BatchLoader
from trainers.data.cache import build_once
from trainers.data.packing import default_max_tokens
from trainers.data.token_store import TokenStore
from trainers.distributed.layout import Layout, gather_objects
from trainers.distributed.sharding import forward_function, reshard
from trainers.kernels.logps import sequence_logps

CODE_VERSION = 2  # raise it with any change of logps.py that moves a result by more than rounding


def weights_key(model: Any) -> str:
    """32 hex digits of what a model computes: its config, and every tensor by name, dtype and content."""
    digest = xxhash.xxh3_128()
    config = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype"):
        config.pop(key, None)  # where it came from, not what it is
    digest.update(json.dumps([config, model.config._attn_implementation], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def reference_logps(
    model: Any,
    store: TokenStore,
    rows: Tensor,
    *,
    layout: Layout,
    cache_dir: Path,
    pad_token_id: int,
    weights: str,
    packing: bool = False,
    autocast: torch.dtype | None = None,
    compute_dtype: str | None = None,
    max_tokens_per_batch: int | None = None,
) -> Tensor:
    """Log-probabilities of chosen and rejected, in nats: (N, 2) float64, memory-mapped; NaN in rows not asked for.

    Every process must come here.

    Args:
        model: the reference; computed through the same `sequence_logps` as the policy, in the model's dtype.
        store: N rows of prompt, chosen, rejected.
        rows: the rows that training will visit.
        layout: of the model.
        cache_dir: where caches lie; the file is `reference/<key>/logps.f64`.
        pad_token_id: fills the batches.
        weights: `weights_key` of the model before it was sharded.
        packing: as the policy has its rows.
        autocast: as the policy has its matrix products.
        compute_dtype: what a sharded model computes in, where that is not its own dtype.
        max_tokens_per_batch: positions of a batch; None: what suits the device, 16,384 where it is padded.
    """
    rows = rows.unique()
    # Another kernel or another release of the model's code may move a result by more than the first batch's check lets.
    code = f"{CODE_VERSION} {transformers.__version__} {torch.__version__} {layout.device.type}"
    kind = f"{model.dtype} {compute_dtype or model.dtype} {packing} {autocast} {torch.get_float32_matmul_precision()}"
    identity = f"{code} {weights} {store.select(rows).key} {kind}"
    directory, key = cache_dir / "reference", xxhash.xxh3_128_hexdigest(identity.encode())
    lengths = store.lengths[rows].long()
    by_length = rows[torch.argsort(lengths[:, 0] + lengths[:, 1:].amax(1), descending=True, stable=True)]
    # Cut as one process cuts them: the parts of the others are skipped, not cut anew.
    limit = max_tokens_per_batch or (default_max_tokens(layout.device) if packing else 16_384)
    loader = BatchLoader(
        store.select(by_length), batch_size=256, seed=0, shuffle=False, num_epochs=1, num_examples=None,
        num_microbatches=1, max_tokens_per_microbatch=limit, pad_token_id=pad_token_id, packing=packing,
    )  # fmt: skip

    def build(folder: Path) -> None:
        layout.on_main(lambda: "compute")
        _write(folder, compute())

    def compute() -> np.ndarray:
        result = np.full((len(store), 2), np.nan)
        for places, logps in _logps_of_rows(model, loader, layout, autocast):
            result[by_length[places].numpy()] = logps.numpy()
        return result

    if layout.is_main:
        error: UserError | None = None
        try:
            build_once(directory, key, build)
        except UserError as failed:
            error = failed
        layout.on_main(lambda: _raise_or(error, "there"))
    else:
        while layout.on_main(lambda: "") == "compute":
            compute()
    entry = _on_every_file_system(directory, key, len(store), layout)
    # A private map: pages are shared with the other processes that read the file.
    values = torch.from_file(str(entry / "logps.f64"), shared=False, size=2 * len(store), dtype=torch.float64)
    return values.view(len(store), 2)


def _raise_or(error: UserError | None, answer: str) -> str:
    if error is not None:
        raise error
    return answer


def _write(folder: Path, logps: np.ndarray) -> None:
    logps.tofile(folder / "logps.f64")


def _on_every_file_system(directory: Path, key: str, num_rows: int, layout: Layout) -> Path:
    """The entry, which rank 0 has, copied to where other processes look for it in vain: disks of other nodes."""
    entry = directory / key
    if not all(gather_objects(entry.is_dir())):
        values = torch.empty(2 * num_rows, dtype=torch.float64)
        if layout.is_main:
            values = torch.from_file(str(entry / "logps.f64"), shared=False, size=2 * num_rows, dtype=torch.float64)
        dist.broadcast(values, src=0)
        build_once(directory, key, lambda folder: _write(folder, values.numpy()))
    return entry


@torch.no_grad()
def _logps_of_rows(
    model: Any, loader: BatchLoader, layout: Layout, autocast: torch.dtype | None
) -> list[tuple[Tensor, Tensor]]:
    """(row numbers (B,), log-probabilities (B, 2)) of the loader's micro-batches, on the host; in rank 0 alone."""
    logps_of = forward_function(model, sequence_logps, autocast=autocast)
    was_training = model.training
    model.eval()
    found: list[tuple[Tensor, Tensor]] = []
    number = 0
    for global_batch in loader.batches():
        for batch in global_batch.microbatches:
            if number % layout.world_size == layout.rank:
                logps, _ = logps_of(batch.to(layout.device, non_blocking=True))
                found.append((batch["row"], logps.cpu()))
            number += 1
    if layout.rank >= (number % layout.world_size or layout.world_size):  # the others have one more: keep step
        logps_of(loader.filler().to(layout.device))
    reshard(model)
    model.train(was_training)
    parts: list[Any] = [None] * layout.world_size
    dist.gather_object(found, parts if layout.is_main else None, dst=0)
    return [one for part in parts if part is not None for one in part]


def attach_reference(
    model: Any,
    loaders: Sequence[BatchLoader],
    *,
    layout: Layout,
    cache_dir: Path,
    weights: str,
    autocast: torch.dtype | None = None,
    compute_dtype: str | None = None,
    max_tokens_per_batch: int | None = None,
) -> None:
    """Gives each loader the columns that a preference objective reads.

    `model` must have the run's initial weights, see above; the trainer compares `weights`, their key, with that of the
    run's start.
    """
    for loader in loaders:
        logps = reference_logps(
            model, loader.store, loader.rows_visited(), layout=layout, cache_dir=cache_dir, weights=weights,
            pad_token_id=loader.pad_token_id, packing=loader.packing, autocast=autocast, compute_dtype=compute_dtype,
            max_tokens_per_batch=max_tokens_per_batch,
        )  # fmt: skip
        loader.columns = {"reference_chosen_logps": logps[:, 0], "reference_rejected_logps": logps[:, 1]}
