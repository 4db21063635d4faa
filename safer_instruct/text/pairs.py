"""Several scored answers to one prompt, turned into pairs of chosen and rejected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

from safer_instruct.text.row_log import BadRow

Pairing = Literal["best_worst", "all"]


class Answer(NamedTuple):
    """One answer to a prompt and its score; larger is better."""

    text: str
    score: float


class Pair(NamedTuple):
    """Two answers, and the margin by which the first one scores higher."""

    chosen: str
    rejected: str
    margin: float


def read_score(value: Any, column: str) -> float:
    """Read a number, possibly written as text in a CSV cell.

    Raises:
        BadRow: It is not a finite number.
    """
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise BadRow("no_score", column, "a number")
    return score


def best(answers: Sequence[Answer]) -> str:
    """Return the text with the highest score; the first one in case of ties."""
    return max(answers, key=lambda answer: answer.score).text


def make_pairs(answers: Sequence[Answer], pairing: Pairing, min_margin: float) -> list[Pair]:
    """Return the pairs of some answers: the best against the worst, or all pairs.

    Equal scores never make a pair, whatever `min_margin` is.

    Raises:
        BadRow: There is no pair: a single answer, equal scores, or all differences below `min_margin`.
    """
    if len(answers) < 2:
        raise BadRow("one_answer")
    ordered = sorted(answers, key=lambda answer: -answer.score)  # stable: ties keep their order
    compared = [(ordered[0], ordered[-1])] if pairing == "best_worst" else combinations(ordered, 2)
    pairs = [Pair(first.text, second.text, first.score - second.score) for first, second in compared]
    unequal = [pair for pair in pairs if pair.margin > 0]
    if not unequal:
        raise BadRow("equal_scores")
    wide = [pair for pair in unequal if pair.margin >= min_margin]
    if not wide:
        raise BadRow("small_margin")
    return wide
