"""What can be wrong with the adapter of a training command (`model.lora`)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from config.paths import find_path
from config.rules import Fault
from config.settings import LoraSettings, TrainConfig


def check_lora(config: TrainConfig) -> list[Fault]:
    """Find out whether an adapter can be trained and saved as it is asked for."""
    if config.model.lora.r is None:
        return list(_without_rank(config))
    return [*_check_packages(config.model.lora), *_check_base(config), *_check_saving(config)]


def _without_rank(config: TrainConfig) -> Iterator[Fault]:
    lora, plain = vars(config.model.lora), vars(LoraSettings())
    for name in lora:
        if lora[name] != plain[name]:
            yield Fault(
                f"model.lora.{name}",
                f"model.lora.{name}={lora[name]}: without a rank there is no adapter; write model.lora.r=16, too",
                ("model.lora.r",),
            )
    if config.checkpoint.merge:
        yield Fault(
            "checkpoint.merge",
            "checkpoint.merge=true: without an adapter (model.lora.r=16) there is nothing to merge",
            ("model.lora.r",),
        )


def _check_packages(lora: LoraSettings) -> Iterator[Fault]:
    for package, name in (("peft", "r"), ("bitsandbytes", "quantize")):
        value = vars(lora)[name]
        if value is not None and find_spec(package) is None:
            yield Fault(
                f"model.lora.{name}",
                f"model.lora.{name}={value} needs the package {package}, which is not installed: pip install {package}",
            )


def _check_base(config: TrainConfig) -> Iterator[Fault]:
    lora, archive = config.model.lora, config.model.archive
    if lora.target_modules == []:
        yield Fault("model.lora.target_modules", "model.lora.target_modules=[]: name some, or null for all of them")
    if archive and find_path(archive).is_file():
        yield Fault(
            "model.archive",
            f"model.archive={archive} with model.lora.r={lora.r}: a policy.pt is no base that peft could load; give a "
            "model folder",
            ("model.lora.r",),
        )
    if lora.quantize is not None and config.trainer.name != "BasicTrainer":
        yield Fault(
            "model.lora.quantize",
            f"model.lora.quantize={lora.quantize}: weights in 4 bits are not sharded; write trainer=BasicTrainer",
            ("trainer.name",),
        )


def _check_saving(config: TrainConfig) -> Iterator[Fault]:
    lora, checkpoint = config.model.lora, config.checkpoint
    if checkpoint.policy_pt and not checkpoint.merge:
        yield Fault(
            "checkpoint.policy_pt",
            "checkpoint.policy_pt=true is a whole model, and an adapter is trained: write checkpoint.merge=true, too",
            ("checkpoint.merge", "model.lora.r"),
        )
    if lora.quantize is not None and checkpoint.merge:
        yield Fault(
            "checkpoint.merge",
            f"checkpoint.merge=true with model.lora.quantize={lora.quantize}: what is merged into 4 bits is rounded "
            "to 4 bits; leave it out, whoever reads the adapter merges it into the base as it is on disk",
            ("model.lora.quantize",),
        )


def check_quantized(config: TrainConfig) -> Iterator[Fault]:
    """Find out whether this machine can keep a base in 4 bits; imports torch, which takes seconds."""
    if config.model.lora.quantize is None:
        return
    import torch

    if config.device == "cpu" or not torch.cuda.is_available():
        yield Fault(
            "model.lora.quantize",
            f"model.lora.quantize={config.model.lora.quantize}: 4 bits need a CUDA device, and this run has none "
            f"(device={config.device}); leave it out",
            ("device",),
        )
