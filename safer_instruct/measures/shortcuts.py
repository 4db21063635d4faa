"""Measure how well shallow features separate chosen from rejected responses: a model could learn such a shortcut.

There are four features, each a score of one response: whether it holds a refusal phrase, its length, its first three
words, and its bag of words. For the last two, a naive Bayes classifier is fitted on the rows of the other folds, so
that it never scores a row that it was fitted on. The area under the ROC curve (AUC) is the probability that a chosen
response scores above a rejected one, with ties counted as half: 0.5 separates nothing, 0 and 1 everything.

Symbols: n pairs. The two responses of a pair are one draw, so the variance of the AUC is that of the sum of their
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
Z = 1.959964  # standard normal quantile for a 95% interval
_WORD = re.compile(r"\w+|[^\w\s]")

Scores = NDArray[np.float64]
Numbers = NDArray[np.int64]
# (chosen responses, rejected responses, folds), n of each -> (scores of chosen, scores of rejected), n of each.
Means = Callable[[Sequence[str], Sequence[str], Numbers], tuple[Scores, Scores]]


@dataclass(frozen=True, slots=True)
class Auc(Rate):
    """An area under the ROC curve with its 95% interval, over `n` pairs; area and interval are None if `n` is 0."""

    @property
    def is_shortcut(self) -> bool:
        """Whether the feature separates chosen from rejected almost perfectly."""
        return self.value is not None and not 1 - TOLD_APART <= self.value <= TOLD_APART


def auc(chosen: Scores, rejected: Scores) -> Auc:
    """Return the AUC of the scores of the chosen and the rejected responses, (n,) each, of the same n pairs."""
    n = len(chosen)
    if not n:
        return Auc(None, None, None, 0)
    above = _placements(chosen, np.sort(rejected))  # for each chosen, the share of rejected below it
    below = 1 - _placements(rejected, np.sort(chosen))  # for each rejected, the share of chosen above it
    value = float(above.mean())
    if n == 1:
        low, high = 0.0, 1.0
    elif value in (0.0, 1.0):  # zero estimated variance: use the interval of a share of n rows
        low, high = wilson_interval(round(value * n), n)
    else:
        error = Z * float(np.std(above + below, ddof=1)) / n**0.5
        low, high = max(0.0, value - error), min(1.0, value + error)
    return Auc(value, low, high, n)


def _placements(scores: Scores, ordered: Scores) -> Scores:
    """Return, for each score, the share of the ordered scores below it, with ties counted as half."""
    sides = [np.searchsorted(ordered, scores, side) for side in ("left", "right")]
    return np.asarray(sum(sides) / (2 * len(ordered)), dtype=np.float64)


def _first_words(text: str) -> set[str]:
    words = _WORD.findall(normalise(text))[:FIRST_WORDS]
    return {" ".join(words[: i + 1]) for i in range(len(words))}


def _words(text: str) -> set[str]:
    return set(_WORD.findall(normalise(text)))


def _scored(score: Callable[[str], float]) -> Means:
    """Return a feature that scores each text with `score`."""

    def scores(chosen: Sequence[str], rejected: Sequence[str], folds: Numbers) -> tuple[Scores, Scores]:
        of_chosen, of_rejected = (np.array([score(text) for text in texts]) for texts in (chosen, rejected))
        return of_chosen, of_rejected

    return scores


def _learned(features: Callable[[str], set[str]]) -> Means:
    """Return a feature that scores each text with a naive Bayes classifier fitted on the other folds."""

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
    """Return the number of texts that have each feature."""
    return np.bincount(np.concatenate([np.empty(0, np.int64), *texts]), minlength=num_features)


MEANS = {
    "refusal_phrase": _scored(lambda text: float(declines(text))),
    "length": _scored(lambda text: float(len(text.split()))),
    "first_words": _learned(_first_words),
    "bag_of_words": _learned(_words),
}


def shortcuts(pairs: Iterable[tuple[str, str, str, str]]) -> dict[str, dict[str, Auc]]:
    """Return name of the feature -> label -> AUC; the label "" stands for all pairs together.

    The classifiers are fitted on all labels together, as a model would be.

    Args:
        pairs: (instruction, label, chosen, rejected); rows with the same instruction are in the same fold.
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
