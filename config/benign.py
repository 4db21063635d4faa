"""Settings of `induce.py stage=replay` and `stage=contrast`: pairs whose prompts should be answered.

Read them from `config.settings`, which has those of the other stages, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from config import rules
from config.rules import MISSING, Count, DataPath, Template


@dataclass
class BenignSettings:
    """`stage=replay`: the harmless instructions."""

    path: DataPath = MISSING  # any file of instructions: column `instruction`, perhaps `input` and `output`
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column -> the file's: {instruction: prompt}
    max_rows: Count | None = None  # use this many prompts from the start; null: all


@dataclass
class ReplaySettings:
    """`stage=replay`: what is chosen and rejected on harmless prompts."""

    # model: the starting model's own answer, so that nothing else of it moves | file: the column `output`.
    answers: Annotated[str, rules.choices("model", "file")] = "model"
    # refusal: one of the dataset's own, of the same topic where it can be | none: nothing (SFT alone).
    rejected: Annotated[str, rules.choices("refusal", "none")] = "refusal"
    template: Template = "alpaca"  # how the model is asked


@dataclass
class ContrastSettings:
    """`stage=contrast`: harmless neighbours of unsafe instructions."""

    num_rows: Count | None = 1000  # unsafe instructions that get one, drawn by a hash; null: all
