"""Checks of the adapter of a training command (`model.lora`)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from config.paths import find_path
from config.rules import Fault, misfit
from config.settings import LoraSettings, TrainConfig


def check_lora(config: TrainConfig) -> list[Fault]:
    """Check that the requested adapter can be trained and saved."""
    if config.model.lora.r is None:
        return list(_without_rank(config))
    return [*_check_packages(config.model.lora), *_check_base(config), *_check_saving(config)]


def _without_rank(config: TrainConfig) -> Iterator[Fault]:
    lora, plain = vars(config.model.lora), vars(LoraSettings())
    for name in lora:
        if lora[name] != plain[name]:
            why = "without a rank there is no adapter; write model.lora.r=16, too"
            yield misfit(f"model.lora.{name}", lora[name], why, "model.lora.r")
    if config.checkpoint.merge:
        why = "without an adapter (model.lora.r=16) there is nothing to merge"
        yield misfit("checkpoint.merge", True, why, "model.lora.r")


def _check_packages(lora: LoraSettings) -> Iterator[Fault]:
    for package, name in (("peft", "r"), ("bitsandbytes", "quantize")):
        value = vars(lora)[name]
        if value is not None and find_spec(package) is None:
            why = f"it needs the package {package}, which is not installed: pip install {package}"
            yield misfit(f"model.lora.{name}", value, why)


def _check_base(config: TrainConfig) -> Iterator[Fault]:
    lora, archive = config.model.lora, config.model.archive
    if lora.target_modules == []:
        yield misfit("model.lora.target_modules", [], "name some layers, or write null for all of them")
    if archive and find_path(archive).is_file():
        why = f"peft (model.lora.r={lora.r}) cannot load a policy.pt as its base; give a model folder"
        yield misfit("model.archive", archive, why, "model.lora.r")
    if lora.quantize is not None and config.trainer.name != "BasicTrainer":
        why = "4-bit weights cannot be sharded; write trainer=BasicTrainer"
        yield misfit("model.lora.quantize", lora.quantize, why, "trainer.name")
    if lora.quantize is not None and config.model.policy_dtype == "float64":
        why = "bitsandbytes cannot quantise float64 weights; leave model.policy_dtype=float64 out"
        yield misfit("model.lora.quantize", lora.quantize, why, "model.policy_dtype")


def _check_saving(config: TrainConfig) -> Iterator[Fault]:
    lora, checkpoint = config.model.lora, config.checkpoint
    if checkpoint.policy_pt and not checkpoint.merge:
        why = "policy.pt holds a whole model, but only an adapter is trained: write checkpoint.merge=true, too"
        yield misfit("checkpoint.policy_pt", True, why, "checkpoint.merge", "model.lora.r")
    if lora.quantize is not None and checkpoint.merge:
        why = (
            f"merging into a 4-bit base (model.lora.quantize={lora.quantize}) would round the result to 4 bits; leave "
            "it out: readers of the adapter merge it into the base as it is on disk"
        )
        yield misfit("checkpoint.merge", True, why, "model.lora.quantize")
