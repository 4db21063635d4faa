"""Several answers to one prompt, each with a score, as pairs of a chosen and a rejected one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

from safer_instruct.text.row_log import BadRow

Pairing = Literal["best_worst", "all"]


class Answer(NamedTuple):
    """One answer to a prompt, and how good it is: larger is better."""

    text: str
    score: float


class Pair(NamedTuple):
    """Two answers, and by how much the first one's score is larger."""

    chosen: str
    rejected: str
    margin: float


def read_score(value: Any, column: str) -> float:
    """Read a number, perhaps as the text of a CSV cell.

    Raises:
        BadRow: It is not a number.
    """
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise BadRow("no_score", column, "a number")
    return score


def best(answers: Sequence[Answer]) -> str:
    """Return the text with the largest score; of equal ones the first."""
    return max(answers, key=lambda answer: answer.score).text


def make_pairs(answers: Sequence[Answer], pairing: Pairing, min_margin: float) -> list[Pair]:
    """Return the pairs of some answers: the best against the worst, or every two of them.

    Equal scores make no pair at any `min_margin`.

    Raises:
        BadRow: There is no such pair: one answer alone, equal scores, or all differences too small.
    """
    if len(answers) < 2:
        raise BadRow("one_answer")
    ordered = sorted(answers, key=lambda answer: -answer.score)  # stable: equal ones keep their order
    compared = [(ordered[0], ordered[-1])] if pairing == "best_worst" else combinations(ordered, 2)
    pairs = [Pair(first.text, second.text, first.score - second.score) for first, second in compared]
    unequal = [pair for pair in pairs if pair.margin > 0]
    if not unequal:
        raise BadRow("equal_scores")
    wide = [pair for pair in unequal if pair.margin >= min_margin]
    if not wide:
        raise BadRow("small_margin")
    return wide
