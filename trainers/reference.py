"""Log-probabilities of the reference model: computed once, by the policy itself before its first step, and kept.

During training no reference model is in memory. The cache is a file found by its content: weights, token rows, dtype,
kind of device, and the versions of the code that computes them. Points of a sweep that start together share it: one
builds, the others wait. The weights are always the run's *initial* ones: callers load those on a resumed run, too, so
that a cache that was deleted meanwhile is never rebuilt from trained weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from torch import Tensor

from trainers.attention import use_packed_attention
from trainers.batching import BatchLoader
from trainers.cache import build_once
from trainers.logps import check_head, sequence_logps
from trainers.token_store import TokenStore

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
    cache_dir: Path,
    pad_token_id: int,
    weights: str,
    packing: bool = False,
    autocast: torch.dtype | None = None,
    max_tokens_per_batch: int | None = None,
) -> Tensor:
    """Log-probabilities of chosen and rejected, in nats: (N, 2) float64, memory-mapped; NaN in rows not asked for.

    Args:
        model: the reference; computed through the same `sequence_logps` as the policy, in the model's dtype.
        store: N rows of prompt, chosen, rejected.
        rows: the rows that training will visit.
        cache_dir: where caches lie; the file is `reference/<key>/logps.f64`.
        pad_token_id: fills the batches.
        weights: `weights_key(model)`.
        packing: as the policy has its rows.
        autocast: as the policy has its matrix products.
        max_tokens_per_batch: positions of a batch; None: what suits the device, 16,384 where it is padded.
    """
    rows = rows.unique()
    # Another kernel or another release of the model's code may move a result by more than the first batch's check lets.
    code = f"{CODE_VERSION} {transformers.__version__} {torch.__version__} {next(model.parameters()).device.type}"
    key = xxhash.xxh3_128_hexdigest(
        f"{code} {weights} {store.select(rows).key} {model.dtype} {packing} {autocast}".encode()
    )

    def build(folder: Path) -> None:
        result = np.memmap(folder / "logps.f64", dtype=np.float64, mode="w+", shape=(len(store), 2))
        result[:] = np.nan
        lengths = store.lengths[rows].long()
        by_length = rows[torch.argsort(lengths[:, 0] + lengths[:, 1:].amax(1), descending=True, stable=True)]
        selected = store.select(by_length)
        for batch_rows, logps in _logps_of_rows(
            model, selected, pad_token_id, packing=packing, autocast=autocast, max_tokens=max_tokens_per_batch
        ):
            result[by_length[batch_rows].numpy()] = logps.numpy()
        result.flush()

    folder = build_once(cache_dir / "reference", key, build)
    # A private map: pages are shared with the other processes that read the file.
    values = torch.from_file(str(folder / "logps.f64"), shared=False, size=2 * len(store), dtype=torch.float64)
    return values.view(len(store), 2)


@torch.no_grad()
def _logps_of_rows(
    model: Any,
    store: TokenStore,
    pad_token_id: int,
    *,
    packing: bool,
    autocast: torch.dtype | None,
    max_tokens: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(row numbers (B,), log-probabilities (B, 2)) of all rows of a store, batch after batch, on the host."""
    check_head(model)
    if packing:
        use_packed_attention(model)
    elif max_tokens is None:
        max_tokens = 16_384
    loader = BatchLoader(
        store, batch_size=256, seed=0, shuffle=False, num_epochs=1, num_examples=None, num_microbatches=1,
        max_tokens_per_microbatch=max_tokens, pad_token_id=pad_token_id, packing=packing,
    )  # fmt: skip
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for global_batch in loader.batches():
        for batch in global_batch.microbatches:
            logps, _ = sequence_logps(model, batch.to(device, non_blocking=True), autocast=autocast)
            yield batch["row"], logps.cpu()
    model.train(was_training)


def attach_reference(
    model: Any,
    loaders: Sequence[BatchLoader],
    *,
    cache_dir: Path,
    autocast: torch.dtype | None = None,
    max_tokens_per_batch: int | None = None,
) -> str:
    """Gives each loader the columns that a preference objective reads; returns the key of the weights.

    `model` must have the run's initial weights, see above; the trainer compares the key with that of the run's start.
    """
    check_head(model)
    if any(loader.packing for loader in loaders):
        use_packed_attention(model)
    weights = weights_key(model)
    for loader in loaders:
        logps = reference_logps(
            model, loader.store, loader.rows_visited(), cache_dir=cache_dir, pad_token_id=loader.pad_token_id,
            weights=weights, packing=loader.packing, autocast=autocast, max_tokens_per_batch=max_tokens_per_batch,
        )  # fmt: skip
        loader.columns = {"reference_chosen_logps": logps[:, 0], "reference_rejected_logps": logps[:, 1]}
    return weights
