"""The last lines of a run: where its weights are, and what is typed next."""

from __future__ import annotations

import re

from config.paths import program
from config.settings import TrainConfig
from trainers.run.run_dir import RunDir


def typed(key: str, value: object) -> str:
    """Spell an override as it is typed: with quotes for shell and Hydra where the value has more than plain words."""
    return f"{key}={value}" if re.fullmatch(r"[\w./~-]+", str(value)) else f"\"{key}='{value}'\""


def next_command(config: TrainConfig, run: RunDir) -> str:
    """Return where the weights are, and the next command of the method."""
    commands = {
        "reverse": f"{program('induce')} {typed('model.name_or_path', run.path)} corpus.path=FILE expert=rules "
        "output=FOLDER",
        "sft": f"{program('train')} loss=dpo model=blank_model "
        f"{typed('model.name_or_path', config.model.name_or_path)} "
        f"{typed('model.archive', run.path)} 'datasets=[si]' datasets.si.path=FOLDER exp_name=NAME",
    }
    evaluate = (
        f"{program('evaluate')} {typed('models.base.path', config.model.name_or_path)} "
        f"{typed(f'models.{config.loss.name}.path', run.path)} prompts.NAME.path=FILE expert=rules output=FOLDER"
    )
    where = f"weights: {run.latest / 'model'}" if run.latest.exists() else "no checkpoint was written (debug=true)"
    return f"{where}\nnext: {commands.get(config.loss.name, evaluate)}"
