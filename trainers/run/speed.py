"""How fast a run is: examples, tokens and arithmetic per second; and what its start says of what makes it slower."""

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
USUAL_WEIGHT = 0.01  # of a matrix of a language model


class Speed:
    """Adds the rates of each step to the metrics; all of it is known on the host."""

    def __init__(self, model: Any, layout: Layout) -> None:
        self._layout = layout
        self._peak_flops = peak_flops(layout.device)
        self._block_flops, self._head_flops = training_flops_per_token(model), head_flops_per_target(model)

    def add(self, metrics: MetricSums, batch: GlobalBatch, *, step_seconds: float, wait_seconds: float) -> None:
        """Add the rates of a step on a global batch.

        The processes' totals are divided by their summed seconds, which is a mean over the processes: what each of them
        counts for itself is multiplied by their number.
        """
        seconds = step_seconds + wait_seconds
        tokens = sum(int(num_tokens(one)) for one in batch.microbatches)
        metrics.add("examples_per_second", batch.num_examples, seconds)
        metrics.add("tokens_per_second", tokens * self._layout.world_size, seconds)
        metrics.add("data_wait_seconds", wait_seconds, 1.0)
        if self._peak_flops is not None:
            # The head runs where a target is predicted, not at every position.
            head = self._head_flops * sum(int(num_target_tokens(one)) for one in batch.microbatches)
            blocks = self._block_flops * sum(map(num_positions, batch.microbatches))
            metrics.add("mfu", blocks / self._peak_flops, seconds)
            metrics.add("mfu_with_head", (blocks + head) / self._peak_flops, seconds)
        metrics.peak("memory/peak", peak_memory_gib(self._layout.device))


def speed_notes(config: TrainConfig, device: torch.device) -> list[str]:
    """Return a sentence for each choice of dtype or size that the user may not have made knowingly."""
    notes = []
    model, is_sharded = config.model, config.trainer.name == "FSDPTrainer"
    if model.fsdp_policy_mp is not None and not is_sharded:
        notes.append("model.fsdp_policy_mp is FSDPTrainer's; this run computes in policy_dtype")
    if model.autocast and emulates_bfloat16(device):
        notes.append(
            "this CPU has no instructions for bfloat16 (AVX512-BF16, AMX); model.autocast=bfloat16 is slower here than "
            "float32, which is model.autocast=null"
        )
    notes += _lost_steps(config)
    if device.type != "cuda":
        return notes
    compute_dtype = model.autocast or (is_sharded and model.fsdp_policy_mp) or model.policy_dtype
    if compute_dtype == "float32" and not config.tf32:
        notes.append(
            "float32 leaves this GPU's tensor cores idle; model.autocast=bfloat16, or with smaller errors tf32=true, "
            "uses them ('experiment=[si_dpo,one_gpu]' sets what one GPU wants)"
        )
    if config.batch_size < SMALL_FOR_A_GPU:
        notes.append(f"batch_size={config.batch_size} leaves most of a GPU idle; try 64 (and choose lr for it)")
    return notes


def _lost_steps(config: TrainConfig) -> list[str]:
    """Return a sentence if most weights are too large for a step of `lr` to change them in their 16 bits.

    A sum is rounded to the nearest number: a step below half the spacing of a weight, eps x |weight| / 2, is lost.
    """
    dtype = getattr(torch, config.model.policy_dtype)
    largest_moved = 2 * config.lr / torch.finfo(dtype).eps
    if dtype.itemsize > 2 or largest_moved > USUAL_WEIGHT:
        return []
    return [
        f"in model.policy_dtype={config.model.policy_dtype} a step of lr={config.lr} changes no weight larger than "
        f"about {largest_moved:.1g}, which most are: use policy_dtype=float32 with model.autocast=bfloat16, or raise lr"
    ]
