"""The end of a run: where its weights are, what can be done with them, and what is typed next."""

from __future__ import annotations

import re
import shlex

from config.settings import TrainConfig
from trainers.run.run_dir import RunDir


def typed(key: str, value: object) -> str:
    """Spell an override as it is typed: with quotes for shell and Hydra where the value has more than plain words."""
    return f"{key}={value}" if re.fullmatch(r"[\w./~-]+", str(value)) else f"\"{key}='{value}'\""


def end_run(config: TrainConfig, run: RunDir) -> str:
    """Upload the newest model if `push_to_hub` asks for that; return the last lines of the run.

    Raises:
        UserError: The upload failed.
    """
    lines = last_lines(config, run)
    if config.push_to_hub and run.latest.exists():
        from config.hub import push_folder  # its library takes a while to import

        folder = run.latest.resolve() / "model"
        address = push_folder(folder, config.push_to_hub, kind="model", again="the same command")
        lines["uploaded"] = address
    return "\n".join(f"{name}: {line}" for name, line in lines.items())


def last_lines(config: TrainConfig, run: RunDir) -> dict[str, str]:
    """Return where the weights are, how to load, serve, evaluate and train them on, and the method's next command."""
    start = f"model=blank_model {typed('model.name_or_path', config.model.name_or_path)}"
    further = f"{start} {typed('model.archive', run.path)}"
    commands = {
        "evaluate": f"python evaluate.py {typed('models.base.path', config.model.name_or_path)} "
        f"{typed(f'models.{config.loss.name}.path', run.path)} prompts.NAME.path=FILE expert=rules output=FOLDER",
        "continue": f"python train.py loss={config.loss.name} {further} datasets.NAME.path=FILE exp_name=NAME",
        "induce": f"python induce.py {typed('model.name_or_path', run.path)} corpus.path=FILE expert=rules "
        "output=FOLDER",
        "dpo": f"python train.py loss=dpo {further} 'datasets=[si]' datasets.si.path=FOLDER exp_name=NAME",
    }
    following = {"reverse": "induce", "sft": "dpo"}.get(config.loss.name, "evaluate")
    if not run.latest.exists():
        return {"weights": "no checkpoint was written (debug=true)", "next": commands[following]}
    folder = run.latest / "model"
    beside = {"reverse": ["continue"], "sft": ["evaluate", "continue"]}.get(config.loss.name, ["continue"])
    return {
        "weights": f"{folder} (model card: README.md)",
        "load": f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})",
        "serve": f"vllm serve {shlex.quote(str(folder))}",
        **{name: commands[name] for name in beside},
        "next": commands[following],
    }
