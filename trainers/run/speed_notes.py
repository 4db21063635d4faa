"""What a run says at its start of dtypes and sizes that make it slower, or less, than its user will expect."""

from __future__ import annotations

import torch

from config.settings import TrainConfig
from trainers.kernels.flops import emulates_bfloat16

SMALL_FOR_A_GPU = 16  # rows of a batch; chosen, not measured
USUAL_WEIGHT = 0.01  # of a matrix of a language model


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
