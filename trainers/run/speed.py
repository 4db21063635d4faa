"""The speed of a run: examples, tokens and FLOPs per second; and notes at its start on settings that make it slow."""

from __future__ import annotations

from typing import Any

import torch

from config.settings import TrainConfig
from trainers.data.batching import GlobalBatch
from trainers.data.packing import num_positions, num_target_tokens, num_tokens
from trainers.distributed.layout import Layout
from trainers.kernels.flops import emulates_bfloat16, head_flops_per_target, peak_flops, training_flops_per_token
from trainers.run.metrics import MetricSums, peak_memory_gib

SMALL_FOR_A_GPU = 16  # rows of a batch; chosen, not measured
USUAL_WEIGHT = 0.01  # typical magnitude in a matrix of a language model


class Speed:
    """Adds the rates of each step to the metrics, from host numbers only (no GPU sync)."""

    def __init__(self, model: Any, layout: Layout) -> None:
        self._layout = layout
        self._peak_flops = peak_flops(layout.device)
        self._block_flops, self._head_flops = training_flops_per_token(model), head_flops_per_target(model)

    def add(self, metrics: MetricSums, batch: GlobalBatch, *, step_seconds: float, wait_seconds: float) -> None:
        """Add the rates of a step on a global batch.

        `MetricSums` divides the totals by the seconds summed over all processes, which averages over processes. So a
        process that counts only its own part must multiply it by the world size.
        """
        seconds = step_seconds + wait_seconds
        tokens = sum(int(num_tokens(one)) for one in batch.microbatches)
        metrics.add("examples_per_second", batch.num_examples, seconds)
        metrics.add("tokens_per_second", tokens * self._layout.world_size, seconds)
        metrics.add("data_wait_seconds", wait_seconds, 1.0)
        if self._peak_flops is not None:
            # The head runs only on positions that predict a target.
            head = self._head_flops * sum(int(num_target_tokens(one)) for one in batch.microbatches)
            blocks = self._block_flops * sum(map(num_positions, batch.microbatches))
            metrics.add("mfu", blocks / self._peak_flops, seconds)
            metrics.add("mfu_with_head", (blocks + head) / self._peak_flops, seconds)
        metrics.peak("memory/peak", peak_memory_gib(self._layout.device))


def speed_notes(config: TrainConfig, device: torch.device) -> list[str]:
    """Return a sentence for each dtype or size that is slow or ineffective and may be unintended."""
    notes = []
    model, is_sharded = config.model, config.trainer.name == "FSDPTrainer"
    if model.fsdp_policy_mp is not None and not is_sharded:
        notes.append("model.fsdp_policy_mp only applies to trainer=FSDPTrainer; this run computes in policy_dtype")
    if model.autocast and emulates_bfloat16(device):
        notes.append(
            "this CPU has no bfloat16 instructions (AVX512-BF16, AMX), so model.autocast=bfloat16 is slower than "
            "float32; set model.autocast=null"
        )
    notes += _lost_steps(config)
    if device.type != "cuda":
        return notes
    compute_dtype = model.autocast or (is_sharded and model.fsdp_policy_mp) or model.policy_dtype
    if compute_dtype == "float32" and not config.tf32:
        notes.append(
            "float32 leaves this GPU's tensor cores idle; use model.autocast=bfloat16, or tf32=true (smaller errors) "
            "('experiment=[si_dpo,one_gpu]' has good settings for one GPU)"
        )
    if config.batch_size < SMALL_FOR_A_GPU:
        notes.append(f"batch_size={config.batch_size} leaves most of a GPU idle; try 64 (and choose lr for it)")
    return notes


def _lost_steps(config: TrainConfig) -> list[str]:
    """Return a sentence if a step of `lr` is rounded away for most weights, because they have 16 bits.

    Sums are rounded to the nearest number, so a step below half the spacing, eps x |weight| / 2, is lost.
    """
    dtype = getattr(torch, config.model.policy_dtype)
    largest_moved = 2 * config.lr / torch.finfo(dtype).eps
    if dtype.itemsize > 2 or largest_moved > USUAL_WEIGHT:
        return []
    return [
        f"in model.policy_dtype={config.model.policy_dtype} a step of lr={config.lr} changes no weight larger than "
        f"about {largest_moved:.1g}, and most are: use policy_dtype=float32 with model.autocast=bfloat16, or raise lr"
    ]
