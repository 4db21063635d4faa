"""Log-probabilities of the reference model: computed once, by the policy before its first step, and cached.

During training no reference model is in memory. The cache is a file whose key covers weights, token rows, dtype, kind
of device, and the versions of the code that computes it. Runs of a sweep that start together share it: one builds it,
the others wait. The weights are always the run's *initial* ones: callers load these also when resuming, so that a
deleted cache is never rebuilt from trained weights.

With several processes, each computes a part of the micro-batches, which are cut as in one process, so that the file
does not depend on the number of processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import transformers
import xxhash
from torch import Tensor
from tqdm import tqdm

from config.errors import UserError
from config.settings import TrainConfig
from trainers.data.batching import BatchLoader, GlobalBatch
from trainers.data.cache import build_once, is_whole
from trainers.data.cutters import Cutter
from trainers.data.token_store import TokenStore, sequence_lengths
from trainers.distributed.following import FollowingWeights
from trainers.distributed.layout import Layout, gather_objects, share_from_main
from trainers.distributed.sharding import forward_function, reshard
from trainers.kernels.logps import autocast_dtype, sequence_logps
from trainers.losses.lengths import ld_alpha_of, response_logps
from trainers.run.progress_line import saying
from trainers.run.saved import RunProgress

CODE_VERSION = 2  # increase it when a change to logps.py changes results by more than rounding
LOGPS = "logps.f64"


def weights_key(model: Any) -> str:
    """Return a hash (32 hex digits) of a model: its config, and every tensor's name, dtype, shape and content."""
    digest = xxhash.xxh3_128()
    config = model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype"):
        config.pop(key, None)  # these describe its origin, not what it computes
    digest.update(json.dumps([config, model.config._attn_implementation], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def reference_logps(
    model: Any, store: TokenStore, rows: Tensor, *, layout: Layout, cache_dir: Path, weights: str, cutter: Cutter,
    autocast: torch.dtype | None = None, compute_dtype: str | None = None, ld_alpha: float | None = None,
) -> Tensor:  # fmt: skip
    """Return log-probabilities of the C responses of a row, in nats: (N, C) float64, memory-mapped; NaN in other rows.

    Every process must call it.

    Args:
        model: the reference; run through the same `sequence_logps` as the policy, in its own dtype.
        store: N rows of a prompt and C responses.
        rows: the rows that training will visit.
        layout: of the model.
        cache_dir: the cache directory; the file is `reference/<key>/logps.f64` in it.
        weights: `weights_key` of the model before it was sharded.
        cutter: cuts the micro-batches, packed or padded like the policy's.
        autocast: dtype of the matrix products, as for the policy.
        compute_dtype: compute dtype of a sharded model, if it differs from its own dtype.
        ld_alpha: the objective's weight of later tokens, see `response_logps`.
    """
    rows, shape = rows.unique(), (len(store), store.num_segments - 1)
    weighed = "" if ld_alpha is None else f" {ld_alpha}"
    kind = f"{model.dtype} {compute_dtype or model.dtype} {cutter.packed} {autocast}{weighed}"
    directory = cache_dir / "reference"
    key = _cache_key(f"{weights} {store.select(rows).content} {kind}", layout.device)
    compute = partial(
        computed_logps, model, store, rows, layout=layout, cutter=cutter, autocast=autocast, ld_alpha=ld_alpha
    )

    def build(folder: Path) -> None:
        layout.on_main(lambda: "compute")
        with saying(f"log-probabilities of the reference on {len(rows)} rows", active=layout.is_main):
            compute().numpy().tofile(folder / LOGPS)

    # Only rank 0 looks for the entry and holds its lock. The others compute when rank 0 tells them, until it is done.
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
    # A private map is copy-on-write: unchanged pages are shared with other processes that read the file.
    return torch.from_file(str(file), shared=False, size=math.prod(shape), dtype=torch.float64).view(shape)


@torch.no_grad()
def computed_logps(
    model: Any, store: TokenStore, rows: Tensor, *, layout: Layout, cutter: Cutter, autocast: torch.dtype | None,
    ld_alpha: float | None,
) -> Tensor:  # fmt: skip
    """Compute what `reference_logps` keeps, in memory; nothing but NaN except in rank 0."""
    by_length = rows[torch.argsort(sequence_lengths(store.lengths[rows]), descending=True, stable=True)]
    loader = BatchLoader(store.select(by_length), cutter, batch_size=256, device=layout.device)
    logps_of = partial(response_logps, forward_function(model, sequence_logps, autocast=autocast), ld_alpha=ld_alpha)
    was_training = model.training
    model.eval()
    found: list[tuple[Tensor, Tensor]] = []  # row numbers (B,), log-probabilities (B, C)
    number = 0
    # The loader cuts as for one process, and each process skips the micro-batches of the others.
    with tqdm(total=len(loader.store), desc="reference", unit=" rows", disable=None if layout.is_main else True) as bar:
        for global_batch in loader.batches():
            for batch in global_batch.microbatches:
                if number % layout.world_size == layout.rank:
                    found.append((batch["row"], logps_of(batch.to(layout.device, non_blocking=True))[0]))
                number += 1
            bar.update(global_batch.num_examples)
    if layout.rank >= (number % layout.world_size or layout.world_size):  # the others run one more: keep in step
        logps_of(loader.filler().to(layout.device))
    reshard(model)
    model.train(was_training)
    parts: list[Any] = [None] * layout.world_size
    # Copied to the host only here, so that the loop does not synchronise with the device.
    own = [(places, logps.cpu()) for places, logps in found]
    dist.gather_object(own, parts if layout.is_main else None, dst=0)
    result = torch.full((len(store), store.num_segments - 1), math.nan, dtype=torch.float64)
    for places, logps in (one for part in parts if part is not None for one in part):
        result[by_length[places]] = logps.view(-1, result.shape[1])
    return result


def _cache_key(identity: str, device: torch.device) -> str:
    # Another kernel or version of the model's code may change results by more than the check of the first batch
    # tolerates; TF32 does.
    code = f"{CODE_VERSION} {transformers.__version__} {torch.__version__} {device.type}"
    return xxhash.xxh3_128_hexdigest(f"{code} {identity} {torch.get_float32_matmul_precision()}".encode())


def _raise(error: UserError) -> NoReturn:
    raise error


def _on_every_file_system(directory: Path, key: str, size: int, layout: Layout) -> Path:
    """Copy rank 0's entry to processes that do not see it (on other nodes' disks), and return its path."""
    entry = directory / key
    if not all(gather_objects(is_whole(entry))):
        values = torch.empty(size, dtype=torch.float64)
        if layout.is_main:
            values = torch.from_file(str(entry / LOGPS), shared=False, size=size, dtype=torch.float64)
        dist.broadcast(values, src=0)
        build_once(directory, key, lambda folder: values.numpy().tofile(folder / LOGPS))
    return entry


def attach_reference(
    model: Any, loaders: Sequence[BatchLoader], *, layout: Layout, cache_dir: Path, weights: str,
    autocast: torch.dtype | None = None, compute_dtype: str | None = None, ld_alpha: float | None = None,
) -> None:  # fmt: skip
    """Give each loader the column `reference_logps`, (N, C), that a preference objective reads.

    `model` must have the run's initial weights (see the module's docstring). `weights` is their key, which the trainer
    compares with that of the start of the run.
    """
    for loader in loaders:
        logps = reference_logps(
            model, loader.store, loader.rows_visited(), layout=layout, cache_dir=cache_dir, weights=weights,
            cutter=loader.cutter.forward_only(layout.device), autocast=autocast, compute_dtype=compute_dtype,
            ld_alpha=ld_alpha,
        )  # fmt: skip
        loader.columns["reference_logps"] = logps


def renewal_is_due(examples: int, renewed_at: int, every: int | None) -> bool:
    """Return whether to renew the reference before the step that starts after `examples` examples."""
    return every is not None and examples - renewed_at >= every


class MovingReference:
    """The reference of a run, updated from the policy every `reference.refresh_examples` (Gorbatovski et al. 2024).

    At a renewal the weights of the reference become

        alpha x policy + (1 - alpha) x previous reference        (TR-DPO, section 3)

    and one pass without gradients computes their log-probabilities for the rows that are trained on until the next
    renewal. It happens just before the step that needs it, so an evaluation or checkpoint at the same point still has
    the previous reference. A resumed run recomputes the same rows with the same weights, and gets the same numbers.
    Without renewals this class does nothing, and the columns of `attach_reference` remain.

    Attributes:
        progress: Of the run; this class sets its `refreshed_at`.
    """

    def __init__(self, policy: Any, settings: TrainConfig, layout: Layout) -> None:
        """Start from the policy's initial weights."""
        self._policy, self._layout = policy, layout
        self._every, self._alpha = settings.reference.refresh_examples, settings.reference.refresh_alpha
        self._weights = None if self._every is None else FollowingWeights(policy, self._alpha)
        self._autocast, self._ld_alpha = autocast_dtype(settings.model.autocast), ld_alpha_of(settings.loss)
        self._model = settings.model
        self._evaluated_at = 0  # when the reference was renewed whose log-probabilities the evaluation loader has
        self.progress = RunProgress()

    def shards(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights of the reference, for a checkpoint."""
        return {} if self._weights is None else {"reference": self._weights.values}

    def is_policy(self, examples: int) -> bool:
        """Tell whether, so many examples into the run, policy and reference compute the same in training."""
        # An adapter is read through its dropout in training alone: that shows unless it is new, and zero.
        exact = self._model.lora.dropout == 0 or (examples == 0 and self._model.archive is None)
        return exact and examples == self.progress.refreshed_at and (examples == 0 or self._alpha == 1)

    def batches(self, loader: BatchLoader) -> Iterator[GlobalBatch]:
        """Yield the batches that the run has not seen yet, each with its current reference's log-probabilities."""
        progress = self.progress
        if self._weights is None or self._every is None:
            yield from loader.batches(progress.examples)
            return
        while progress.examples < loader.total_examples:
            if renewal_is_due(progress.examples, progress.refreshed_at, self._every):
                self._weights.update()
                progress.refreshed_at = progress.examples
                progress.objective.clear()  # running means of rewards under the old reference
            if progress.refreshed_at:
                stop = progress.refreshed_at + self._every
                rows = loader.rows_of_batches(progress.refreshed_at, stop)
                self._compute(loader, torch.cat([rows, loader.filler()["row"]]).unique())
            for batch in loader.batches(progress.examples):  # prefetched with old columns: restart after a renewal
                yield batch
                if renewal_is_due(progress.examples, progress.refreshed_at, self._every):
                    break

    def prepare_evaluation(self, loader: BatchLoader | None) -> None:
        """Give the evaluation loader, if there is one, the log-probabilities of the current reference."""
        if loader is not None and self._evaluated_at != self.progress.refreshed_at:
            self._compute(loader, loader.rows_visited())
            self._evaluated_at = self.progress.refreshed_at

    def _compute(self, loader: BatchLoader, rows: Tensor) -> None:
        assert self._weights is not None
        with self._weights.in_place():
            logps = computed_logps(
                self._policy, loader.store, rows, layout=self._layout, cutter=loader.cutter.forward_only(
                    self._layout.device
                ), autocast=self._autocast, ld_alpha=self._ld_alpha,
            )  # fmt: skip
        share_from_main(logps)
        loader.columns["reference_logps"] = logps
