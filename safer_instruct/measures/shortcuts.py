"""How far chosen and rejected responses are told apart by shallow means: what a model can learn in place of the matter.

Four means, each a score of one response alone: whether it declines by phrase, its length, its first three words, and
its words in any order. For the last two a naive Bayes classifier is fitted to the rows of the other folds, so that what
it says of a row is no memory of it. The area under the ROC curve (AUC) is the probability that a chosen response scores
above a rejected one, ties counting half: 0.5 tells nothing apart, 1 and 0 everything.

Symbols: n pairs; the two responses of a pair are one draw, so the variance of the AUC is that of the sum of their
placement values (DeLong et al. 1988, in the clustered form of Obuchowski 1997).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safer_instruct.measures.rates import Rate
from safer_instruct.measures.statistics import wilson_interval
from safer_instruct.text.examples import in_shard, normalise, text_id
from safer_instruct.text.refusals import declines

FOLDS = 5
FIRST_WORDS = 3
TOLD_APART = 0.95  # an AUC above it, or below 1 - it, is a shortcut
Z = 1.959964  # of a 95% interval
_WORD = re.compile(r"\w+|[^\w\s]")

Scores = NDArray[np.float64]
Numbers = NDArray[np.int64]
# From the chosen and the rejected responses of all pairs (n each) and their folds (n,) to the scores of both.
Means = Callable[[Sequence[str], Sequence[str], Numbers], tuple[Scores, Scores]]


@dataclass(frozen=True, slots=True)
class Auc(Rate):
    """An area under the ROC curve with its 95% interval, over `n` pairs; all three are None where there is none."""

    @property
    def is_shortcut(self) -> bool:
        """Whether chosen and rejected are all but told apart."""
        return self.value is not None and not 1 - TOLD_APART <= self.value <= TOLD_APART


def auc(chosen: Scores, rejected: Scores) -> Auc:
    """Return the AUC of scores (n,) of the chosen and the rejected responses of the same n pairs."""
    n = len(chosen)
    if not n:
        return Auc(None, None, None, 0)
    above = _placements(chosen, np.sort(rejected))  # share of the rejected below each chosen
    below = 1 - _placements(rejected, np.sort(chosen))  # share of the chosen above each rejected
    value = float(above.mean())
    if n == 1:
        low, high = 0.0, 1.0
    elif value in (0.0, 1.0):  # no spread to estimate from: as a share of n rows
        low, high = wilson_interval(round(value * n), n)
    else:
        error = Z * float(np.std(above + below, ddof=1)) / n**0.5
        low, high = max(0.0, value - error), min(1.0, value + error)
    return Auc(value, low, high, n)


def _placements(scores: Scores, ordered: Scores) -> Scores:
    """Return for each score the share of the ordered ones below it, ties counting half."""
    sides = [np.searchsorted(ordered, scores, side) for side in ("left", "right")]
    return np.asarray(sum(sides) / (2 * len(ordered)), dtype=np.float64)


def _first_words(text: str) -> set[str]:
    words = _WORD.findall(normalise(text))[:FIRST_WORDS]
    return {" ".join(words[: i + 1]) for i in range(len(words))}


def _words(text: str) -> set[str]:
    return set(_WORD.findall(normalise(text)))


def _scored(score: Callable[[str], float]) -> Means:
    """Make the means that score a text by a function of it."""

    def scores(chosen: Sequence[str], rejected: Sequence[str], folds: Numbers) -> tuple[Scores, Scores]:
        of_chosen, of_rejected = (np.array([score(text) for text in texts]) for texts in (chosen, rejected))
        return of_chosen, of_rejected

    return scores


def _learned(features: Callable[[str], set[str]]) -> Means:
    """Make the means that score a text by a naive Bayes classifier of its features, fitted to the other folds."""

    def scores(chosen: Sequence[str], rejected: Sequence[str], folds: Numbers) -> tuple[Scores, Scores]:
        numbers: dict[str, int] = {}

        def numbered(text: str) -> Numbers:
            return np.array([numbers.setdefault(name, len(numbers)) for name in sorted(features(text))], np.int64)

        of_chosen, of_rejected = [numbered(text) for text in chosen], [numbered(text) for text in rejected]
        found = np.zeros(len(folds)), np.zeros(len(folds))
        for fold in range(FOLDS):
            others = np.flatnonzero(folds != fold)
            counts = [_count([texts[i] for i in others], len(numbers)) for texts in (of_chosen, of_rejected)]
            weights = np.log(counts[0] + 1) - np.log(counts[1] + 1)
            for i in np.flatnonzero(folds == fold):
                found[0][i], found[1][i] = weights[of_chosen[i]].sum(), weights[of_rejected[i]].sum()
        return found

    return scores


def _count(texts: Sequence[Numbers], num_features: int) -> Numbers:
    """Return in how many of the texts each feature is."""
    return np.bincount(np.concatenate([np.empty(0, np.int64), *texts]), minlength=num_features)


MEANS = {
    "refusal_phrase": _scored(lambda text: float(declines(text))),
    "length": _scored(lambda text: float(len(text.split()))),
    "first_words": _learned(_first_words),
    "bag_of_words": _learned(_words),
}


def shortcuts(pairs: Iterable[tuple[str, str, str, str]]) -> dict[str, dict[str, Auc]]:
    """Return name of the means -> label -> AUC; the label "" is all pairs together.

    The classifiers are fitted to all labels together, as a model is trained on them.

    Args:
        pairs: (instruction, label, chosen, rejected); rows of one instruction are in one fold.
    """
    rows = list(pairs)
    instructions, labels, chosen, rejected = (list(column) for column in zip(*rows, strict=True)) if rows else ([],) * 4
    keys = [text_id("fold", normalise(instruction)) for instruction in instructions]
    folds = np.array([next(f for f in range(FOLDS) if in_shard(key, f, FOLDS)) for key in keys], np.int64)
    of_label = {"": np.arange(len(rows))}
    of_label |= {label: np.flatnonzero(np.array(labels) == label) for label in dict.fromkeys(labels)}
    found = {}
    for name, score in MEANS.items():
        of_chosen, of_rejected = score(chosen, rejected, folds)
        found[name] = {label: auc(of_chosen[rows_of], of_rejected[rows_of]) for label, rows_of in of_label.items()}
    return found
