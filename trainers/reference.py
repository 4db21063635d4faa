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
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import transformers
import xxhash
from torch import Tensor

from config.errors import UserError
from trainers.data.batching import BatchLoader
from trainers.data.cache import build_once, is_whole
from trainers.data.cutters import Cutter
from trainers.data.token_store import TokenStore, sequence_lengths
from trainers.distributed.layout import Layout, gather_objects
from trainers.distributed.sharding import forward_function, reshard
from trainers.kernels.logps import sequence_logps
from trainers.losses.lengths import response_logps
from trainers.run.progress_line import saying

CODE_VERSION = 2  # raise it with any change of logps.py that moves a result by more than rounding
LOGPS = "logps.f64"


def weights_key(model: Any) -> str:
    """Return 32 hex digits of what a model computes: its config, and every tensor by name, dtype and content."""
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
    weights: str,
    cutter: Cutter,
    autocast: torch.dtype | None = None,
    compute_dtype: str | None = None,
    ld_alpha: float | None = None,
) -> Tensor:
    """Return log-probabilities of the C responses of a row, in nats: (N, C) float64, memory-mapped; NaN in other rows.

    Every process must come here.

    Args:
        model: the reference; computed through the same `sequence_logps` as the policy, in the model's dtype.
        store: N rows of a prompt and C responses.
        rows: the rows that training will visit.
        layout: of the model.
        cache_dir: where caches lie; the file is `reference/<key>/logps.f64`.
        weights: `weights_key` of the model before it was sharded.
        cutter: makes the micro-batches; of the policy's kind.
        autocast: as the policy has its matrix products.
        compute_dtype: what a sharded model computes in, where that is not its own dtype.
        ld_alpha: as the objective weighs tokens, see `response_logps`.
    """
    rows, shape = rows.unique(), (len(store), store.num_segments - 1)
    kind = f"{model.dtype} {compute_dtype or model.dtype} {cutter.packed} {autocast}"
    content = f"{weights} {store.select(rows).content} {kind}" + ("" if ld_alpha is None else f" {ld_alpha}")
    directory, key = cache_dir / "reference", _cache_key(content, layout.device)
    by_length = rows[torch.argsort(sequence_lengths(store.lengths[rows]), descending=True, stable=True)]
    loader = BatchLoader(store.select(by_length), cutter, batch_size=256, device=layout.device)

    def compute() -> np.ndarray:
        result = np.full(shape, np.nan)
        for places, logps in _logps_of_rows(model, loader, layout, autocast, ld_alpha):
            result[by_length[places].numpy()] = logps.view(-1, shape[1]).numpy()
        return result

    def build(folder: Path) -> None:
        layout.on_main(lambda: "compute")
        with saying(f"log-probabilities of the reference on {len(rows)} rows", active=layout.is_main):
            compute().tofile(folder / LOGPS)

    # Rank 0 alone looks for the entry and holds its lock. The others compute when it says so, until it is through.
    if layout.is_main:
        try:
            build_once(directory, key, build)
        except UserError as error:
            layout.on_main(partial(_raise, error))
        layout.on_main(lambda: "through")
    else:
        while layout.on_main(lambda: "") == "compute":
            compute()
    file = _on_every_file_system(directory, key, math.prod(shape), layout) / LOGPS
    # A private map: its pages are shared with the other processes that read the file.
    return torch.from_file(str(file), shared=False, size=math.prod(shape), dtype=torch.float64).view(shape)


def _cache_key(identity: str, device: torch.device) -> str:
    # Another kernel, or another release of the model's code, may move a result by more than the check of the first
    # batch tolerates; TF32 does.
    code = f"{CODE_VERSION} {transformers.__version__} {torch.__version__} {device.type}"
    return xxhash.xxh3_128_hexdigest(f"{code} {identity} {torch.get_float32_matmul_precision()}".encode())


def _raise(error: UserError) -> NoReturn:
    raise error


def _on_every_file_system(directory: Path, key: str, size: int, layout: Layout) -> Path:
    """Copy rank 0's entry to where a process does not see it (the disks of other nodes), and return its path."""
    entry = directory / key
    if not all(gather_objects(is_whole(entry))):
        values = torch.empty(size, dtype=torch.float64)
        if layout.is_main:
            values = torch.from_file(str(entry / LOGPS), shared=False, size=size, dtype=torch.float64)
        dist.broadcast(values, src=0)
        build_once(directory, key, lambda folder: values.numpy().tofile(folder / LOGPS))
    return entry


@torch.no_grad()
def _logps_of_rows(
    model: Any, loader: BatchLoader, layout: Layout, autocast: torch.dtype | None, ld_alpha: float | None
) -> list[tuple[Tensor, Tensor]]:
    """Return (row numbers (B,), log-probabilities (B, C)) of each micro-batch, on the host; nothing but in rank 0."""
    forward = forward_function(model, sequence_logps, autocast=autocast)
    logps_of = partial(response_logps, forward, ld_alpha=ld_alpha)
    was_training = model.training
    model.eval()
    found: list[tuple[Tensor, Tensor]] = []
    number = 0
    # The loader cuts as if there were one process, and each process skips what is the others'.
    for global_batch in loader.batches():
        for batch in global_batch.microbatches:
            if number % layout.world_size == layout.rank:
                found.append((batch["row"], logps_of(batch.to(layout.device, non_blocking=True))[0]))
            number += 1
    if layout.rank >= (number % layout.world_size or layout.world_size):  # the others have one more: keep step
        logps_of(loader.filler().to(layout.device))
    reshard(model)
    model.train(was_training)
    parts: list[Any] = [None] * layout.world_size
    # Copied to the host only here: the device has not been waited for between two micro-batches.
    own = [(rows, logps.cpu()) for rows, logps in found]
    dist.gather_object(own, parts if layout.is_main else None, dst=0)
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
    ld_alpha: float | None = None,
) -> None:
    """Give each loader the column `reference_logps`, (N, C), that a preference objective reads.

    `model` must have the run's initial weights, see above; the trainer compares `weights`, their key, with that of the
    run's start.
    """
    for loader in loaders:
        logps = reference_logps(
            model, loader.store, loader.rows_visited(), layout=layout, cache_dir=cache_dir, weights=weights,
            cutter=loader.cutter.forward_only(layout.device), autocast=autocast, compute_dtype=compute_dtype,
            ld_alpha=ld_alpha,
        )  # fmt: skip
        loader.columns["reference_logps"] = logps
