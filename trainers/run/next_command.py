"""The first and last lines that a run prints: its size, where its weights are, and commands that use them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch
from transformers import PreTrainedModel

from config.paths import program
from config.settings import LoraSettings, TrainConfig
from trainers.data.batching import BatchLoader
from trainers.distributed.layout import Layout
from trainers.run.run_dir import RunDir


def typed(key: str, value: object) -> str:
    """Spell an override for the shell, quoted for shell and Hydra if the value has special characters."""
    return f"{key}={value}" if re.fullmatch(r"[\w./~-]+", str(value)) else f"\"{key}='{value}'\""


def lora_words(config: TrainConfig) -> str:
    """Return the overrides of `model.lora` with which a new run trains this run's adapter further."""
    words = ""
    for name, value in vars(config.model.lora).items():
        if isinstance(value, list):
            words += f" 'model.lora.{name}=[{','.join(value)}]'"
        elif value != vars(LoraSettings())[name]:
            words += f" model.lora.{name}={value}"
    return words


def end_run(config: TrainConfig, run: RunDir) -> str:
    """Upload the newest model if `push_to_hub` is set; return the last lines of the run.

    Raises:
        UserError: The upload failed.
    """
    lines = last_lines(config, run)
    if config.push_to_hub and run.latest.exists():
        from config.hub import push_folder  # its library takes a while to import

        folder = run.latest.resolve() / _weights(config)
        address = push_folder(folder, config.push_to_hub, kind="model", again="the same command")
        lines["uploaded"] = address
    return "\n".join(f"{name}: {line}" for name, line in lines.items())


def _weights(config: TrainConfig) -> str:
    """Return the checkpoint folder that other programs read: `model`, or `adapter` for an unmerged adapter."""
    return "model" if config.model.lora.r is None or config.checkpoint.merge else "adapter"


def last_lines(config: TrainConfig, run: RunDir) -> dict[str, str]:
    """Return where the weights are, how to load, serve, evaluate and further train them, and the next command."""
    base, is_model = config.model.name_or_path, _weights(config) == "model"
    archive = f"{typed('model.name_or_path', base)} {typed('model.archive', run.path)}"
    further = f"model=blank_model {archive}{'' if is_model else lora_words(config)}"
    reversed_model = typed("model.name_or_path", run.path) if is_model else archive
    commands = {
        "evaluate": f"{program('evaluate')} {typed('models.base.path', base)} "
        f"{typed(f'models.{config.loss.name}.path', run.path)} prompts.NAME.path=FILE expert=rules output=FOLDER",
        "continue": f"{program('train')} loss={config.loss.name} {further} datasets.NAME.path=FILE exp_name=NAME",
        "induce": f"{program('induce')} {reversed_model} corpus.path=FILE expert=rules output=FOLDER",
        "dpo": f"{program('train')} loss=dpo {further} 'datasets=[si]' datasets.si.path=FOLDER exp_name=NAME",
    }
    following = {"reverse": "induce", "sft": "dpo"}.get(config.loss.name, "evaluate")
    if not run.latest.exists():
        return {"weights": "no checkpoint was written (debug=true)", "next": commands[following]}
    folder = run.latest / _weights(config)
    beside = {"reverse": ["continue"], "sft": ["evaluate", "continue"]}.get(config.loss.name, ["continue"])
    return {
        "weights": f"{folder} (model card: README.md)",
        **_uses(folder, str(base), is_model),
        **{name: commands[name] for name in beside},
        "next": commands[following],
    }


def _uses(folder: Path, base: str, is_model: bool) -> dict[str, str]:
    """Return how to load and serve a model, or an adapter with its base, in other programs."""
    if is_model:
        load = f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
        return {"load": load, "serve": f"vllm serve {shlex.quote(str(folder))}"}
    return {
        "load": f"peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})",
        "serve": f"vllm serve {shlex.quote(base)} --enable-lora --lora-modules {shlex.quote(f'tuned={folder}')}",
    }


def starting_line(policy: PreTrainedModel, loader: BatchLoader, layout: Layout, done: int) -> str:
    """Return a run's device, size and length, and where it resumes: after `done` examples."""
    kind = str(policy.dtype).removeprefix("torch.")
    begin = f"resumes from step-{done}" if done else "from the beginning"
    return (
        f"{layout.device} ({torch.get_num_threads()} threads), {layout.world_size} process(es), weights in {kind}, "
        f"{policy.num_parameters():,} parameters; {loader.steps} steps, {loader.total_examples} examples; {begin}"
    )
