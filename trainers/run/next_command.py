"""The first line of a run and its last ones: what it is, where its weights are, and what is typed next."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel

from config.paths import program
from config.settings import LoraSettings, TrainConfig
from trainers.data.batching import BatchLoader
from trainers.distributed.layout import Layout
from trainers.run.run_dir import RunDir


def typed(key: str, value: object) -> str:
    """Spell an override as it is typed: with quotes for shell and Hydra where the value has more than plain words."""
    return f"{key}={value}" if re.fullmatch(r"[\w./~-]+", str(value)) else f"\"{key}='{value}'\""


def lora_words(config: TrainConfig) -> str:
    """Return what trains the adapter of a run further."""
    words = ""
    for name, value in vars(config.model.lora).items():
        if isinstance(value, list):
            words += f" 'model.lora.{name}=[{','.join(value)}]'"
        elif value != vars(LoraSettings())[name]:
            words += f" model.lora.{name}={value}"
    return words


def next_command(config: TrainConfig, run: RunDir) -> str:
    """Return where the weights are, and the next command of the method."""
    has_model = config.model.lora.r is None or config.checkpoint.merge
    archive = f"{typed('model.name_or_path', config.model.name_or_path)} {typed('model.archive', run.path)}"
    reversed_model = typed("model.name_or_path", run.path) if has_model else archive
    commands = {
        "reverse": f"{program('induce')} {reversed_model} corpus.path=FILE expert=rules output=FOLDER",
        "sft": f"{program('train')} loss=dpo model=blank_model {archive}{'' if has_model else lora_words(config)} "
        "'datasets=[si]' datasets.si.path=FOLDER exp_name=NAME",
    }
    evaluate = (
        f"{program('evaluate')} {typed('models.base.path', config.model.name_or_path)} "
        f"{typed(f'models.{config.loss.name}.path', run.path)} prompts.NAME.path=FILE expert=rules output=FOLDER"
    )
    weights = run.latest / ("model" if has_model else "adapter")
    where = f"weights: {weights}" if run.latest.exists() else "no checkpoint was written (debug=true)"
    return f"{where}\nnext: {commands.get(config.loss.name, evaluate)}"


def starting_line(policy: PreTrainedModel, loader: BatchLoader, layout: Layout, done: int) -> str:
    """Return what a run computes with, how long it is, and from where it goes on: `done` examples."""
    kind = str(policy.dtype).removeprefix("torch.")
    begin = f"goes on from step-{done}" if done else "from the beginning"
    return (
        f"{layout.device} ({torch.get_num_threads()} threads), {layout.world_size} process(es), weights in {kind}, "
        f"{policy.num_parameters():,} parameters; {loader.steps} steps, {loader.total_examples} examples; {begin}"
    )
