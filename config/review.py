"""Settings of `induce.py stage=review`, and of the dataset card. Read them from `config.settings`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from config import rules
from config.rules import Count


@dataclass
class ReviewSettings:
    """`stage=review`: the sample of pairs that people look at."""

    rows: Count = 100  # pairs of the dataset, as many of each label as there can be
    # Pairs that the filter dropped, and as many that it kept, all without their safe response: what the agreement with
    # the expert is measured on. Needs corpus.path.
    dropped: Annotated[int, rules.at_least(0)] = 0
    seed: int = 0  # of the drawing


@dataclass
class CardSettings:
    """What the dataset card says of the rights and the language of its rows."""

    license: str = (
        "unknown"  # identifier of the Hugging Face Hub: cc-by-4.0, other, ...; that of the corpus, most often
    )
    language: list[str] = field(default_factory=lambda: ["en"])  # ISO 639 codes
