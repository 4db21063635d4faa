"""FLOPs of a training step for `mfu` (model FLOPs utilisation), and whether a CPU has bfloat16 instructions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Dense bfloat16 FLOP/s from the vendor's data sheets. The first key contained in the device's name applies, so NVL and
# PCIe boards come first: they have less power and a lower clock than those named by the chip alone (SXM).
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 9.89e14,
    "H200 NVL": 8.36e14,
    "H200": 9.89e14,
    "H100 NVL": 8.36e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "H800": 9.89e14,
    "A100": 3.12e14,
    "A800": 3.12e14,
    "L40S": 3.62e14,
    "A10G": 7.0e13,
    "RTX 4090": 1.65e14,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the peak FLOP/s of a GPU for bfloat16 matrix products; None for a CPU, or a GPU not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def emulates_bfloat16(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether a CPU has no bfloat16 instructions and emulates such products, several times more slowly.

    False if the operating system does not report it.
    """
    if device.type != "cpu" or not cpuinfo.is_file():
        return False
    flags = {word for line in cpuinfo.read_text().splitlines() for word in line.lower().split() if "bf16" in word}
    return flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})  # the last one is Arm's


def training_flops_per_token(model: Any) -> float:
    """Return the FLOPs per token in the blocks, both passes: 6 x their parameters (Kaplan et al. 2020, sec. 2.1).

    For frozen parameters 4 x: the backward pass computes only the gradient of their input, not their own. Embeddings,
    the output head and the score products of attention are not counted, so that `mfu` is a lower bound.
    """
    embeddings = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    return sum(_flops(one) for one in model.parameters() if id(one) not in embeddings)


def head_flops_per_target(model: Any) -> float:
    """Return the FLOPs of the output head per target token, both passes: 6 x its parameters, 4 x if it is frozen.

    For `mfu_with_head`. It is per target token, not per position, because the head runs on target tokens only.
    """
    return _flops(model.get_output_embeddings().weight)


def _flops(parameter: nn.Parameter) -> float:
    shape = parameter.shape
    if (quantized := getattr(parameter, "quant_state", None)) is not None:
        shape = quantized.shape  # bitsandbytes packs two 4-bit numbers into a byte
    return (6.0 if parameter.requires_grad else 4.0) * math.prod(shape)
