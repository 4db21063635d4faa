"""Read the decisions that people made on the pages of stage=review, for the audit to count and the merge to apply.

A pair is rejected if at least half of the people who decided on it reject it. Skipping a pair is not a decision.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.paths import find_path
from safer_instruct.dataset.rows import dataset_rows, row_example, row_label
from safer_instruct.measures.statistics import cohens_kappa, weighted_interval, wilson_interval
from safer_instruct.text.examples import Example, normalise, text_id
from safer_instruct.text.messages import Messages, write_history

FORMAT = "safer-instruct review"
KEEP, WRONG, UNSAFE, SKIP = DECISIONS = ("keep", "wrong_instruction", "unsafe_answer", "skip")
EXPERT = "the expert"


@dataclass(frozen=True, slots=True)
class Decision:
    """One person's decision on one pair; `whole`: the safe response was shown."""

    id: str
    pair: str
    label: str
    whole: bool
    decision: str


@dataclass(frozen=True, slots=True)
class Review:
    """The decisions of one person, by id; skipped pairs are left out."""

    reviewer: str
    decisions: Mapping[str, Decision]


def pair_hash(instruction: str, rejected: str, chosen: str, before: Messages = ()) -> str:
    """Return the hash that identifies a pair; it ignores case and whitespace, except in the messages `before` it."""
    return text_id(*map(normalise, (instruction, rejected, chosen)), *filter(None, [write_history(before)]))


def read_reviews(paths: Sequence[str]) -> list[Review]:
    """Read the files exported from review pages.

    Raises:
        UserError: A file is not such an export, holds no decision, or is the second file of the same person.
    """
    reviews: dict[str, Review] = {}
    for path in paths:
        review = _read_review(path)
        if review.reviewer in reviews:
            raise UserError(
                f"reviews: {path} is a second file of the reviewer '{review.reviewer}'; give only the newest"
            )
        reviews[review.reviewer] = review
    return list(reviews.values())


def _read_review(path: str) -> Review:
    try:
        document = json.loads(find_path(path).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise KeyError("format")
        found = [Decision(**{key: row[key] for key in Decision.__slots__}) for row in document["decisions"]]
        if not all(isinstance(text, str) for one in found for text in (one.id, one.pair, one.label, one.decision)):
            raise TypeError("a decision holds something else than texts")
    except (ValueError, RecursionError, KeyError, TypeError, IsADirectoryError) as error:
        raise UserError(
            f"reviews: {path} is not an export of a review page ({type(error).__name__}: {error}); press Export there"
        ) from None
    for one in found:
        if one.decision not in DECISIONS:
            raise UserError(f"reviews: {path}: '{one.decision}' of {one.id} is not one of {', '.join(DECISIONS)}")
    decided = {one.id: one for one in found if one.decision != SKIP}
    if not decided:
        raise UserError(f"reviews: {path} holds no decision yet; leave it out")
    return Review(str(document.get("reviewer") or Path(path).stem), decided)


def is_rejected(decisions: Iterable[str]) -> bool:
    """Tell whether a pair is rejected: at least half of the people who decided on it reject it."""
    found = [decision != KEEP for decision in decisions]
    return 2 * sum(found) >= len(found)


def decisions_by_id(reviews: Sequence[Review]) -> dict[str, list[Decision]]:
    """Return the decisions on each pair, by its id."""
    found: dict[str, list[Decision]] = {}
    for review in reviews:
        for id, decision in review.decisions.items():
            found.setdefault(id, []).append(decision)
    return found


@dataclass(frozen=True)
class Rejections:
    """The pairs that people rejected (id -> hashes of the texts they saw), and the number of people and pairs."""

    pairs: Mapping[str, frozenset[str]] = field(default_factory=dict)
    num_reviewers: int = 0
    num_decided: int = 0

    def counts(self) -> dict[str, int]:
        """Return the counts for the dataset card."""
        return {"reviewers": self.num_reviewers, "pairs": self.num_decided, "rejected": len(self.pairs)}

    def rejects(self, id: str, instruction: str, rejected: str, chosen: str, before: Messages = ()) -> bool:
        """Tell whether a pair was rejected.

        Raises:
            UserError: The rejected pair with this id had other texts.
        """
        if id not in self.pairs:
            return False
        if not self.pairs[id] & {pair_hash(instruction, rejected, shown, before) for shown in (chosen, "")}:
            raise UserError(
                f"reviews: the texts of the pair {id} have changed since people rejected it; draw a new page "
                "(stage=review), and give reviews of the current pairs"
            )
        return True


NOTHING_REJECTED = Rejections()


def read_rejections(paths: Sequence[str]) -> Rejections:
    """Read which pairs a merge must leave out; see `read_reviews`."""
    reviews = read_reviews(paths)
    decided = decisions_by_id(reviews)
    rejected = {id: of for id, of in decided.items() if is_rejected(one.decision for one in of)}
    pairs = {id: frozenset(one.pair for one in of) for id, of in rejected.items()}
    return Rejections(pairs, len(reviews), len(decided))


def measure_reviews(reviews: Sequence[Review], dataset: str) -> dict[str, Any]:
    """Measure the precision of a dataset, and how far people agree with each other and with the expert.

    Precision is the share of pairs that are not rejected. The total weights each label by its rows in the dataset,
    since the sample has as many pairs of a rare label as of a frequent one.

    Returns:
        `{"reviewers", "by_label": {label: {rows, reviewed, wrong_instruction, unsafe_answer, precision}},
        "total": the same, "covered": share of the rows whose label was reviewed, "agreement": [of each two]}`.

    Raises:
        UserError: The reviewed pairs are not those of the dataset.
    """
    decided = decisions_by_id(reviews)
    sizes: Counter[str] = Counter()
    labels: dict[str, str] = {}  # id -> label of the decided pairs in the dataset, which are those the expert kept
    for where, row, texts in dataset_rows(dataset):
        pair, label = row_example(where, row, texts), row_label(row)
        id = pair.id
        sizes[label] += 1
        if id in decided and id not in labels:
            labels[id] = label
            _require_same(decided[id], pair)
    if absent := [id for id, of in decided.items() if id not in labels and any(one.whole for one in of)]:
        raise UserError(
            f"reviews: {len(absent)} of the {len(decided)} reviewed pairs are not in path={dataset} "
            f"(first: {absent[0]}); give the dataset that the review page was drawn from"
        )
    whole = {id: [one.decision for one in of if one.whole] for id, of in decided.items() if id in labels}
    by_label: dict[str, dict[str, Any]] = {}
    for label in sizes:
        of_label = [decisions for id, decisions in whole.items() if labels[id] == label and decisions]
        by_label[label] = _precision(sizes[label], of_label)
    return {
        "reviewers": [review.reviewer for review in reviews],
        "by_label": by_label,
        "total": _weighed(by_label),
        "covered": sum(one["rows"] for one in by_label.values() if one["reviewed"]) / sum(sizes.values()),
        "agreement": _agreements(reviews, labels),
    }


def _require_same(decisions: Sequence[Decision], pair: Example) -> None:
    for one in decisions:
        chosen = (pair.chosen or "") if one.whole else ""
        if one.pair != pair_hash(pair.instruction or "", pair.rejected or "", chosen, pair.before):
            raise UserError(f"reviews: the texts of the pair {one.id} have changed since its review; draw a new page")


def _precision(rows: int, pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Count the decisions on the pairs of one label, and compute its precision."""
    kept, n = sum(not is_rejected(decisions) for decisions in pairs), len(pairs)
    low, high = wilson_interval(kept, n) if n else (None, None)
    reasons = Counter(decision for decisions in pairs for decision in decisions)
    return {
        "rows": rows,
        "reviewed": n,
        "kept": kept,
        **{reason: reasons[reason] for reason in (WRONG, UNSAFE)},
        "precision": {"value": kept / n if n else None, "low": low, "high": high, "n": n},
    }


def _weighed(by_label: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(one[key] for one in by_label.values()) for key in ("rows", "reviewed", "kept", WRONG, UNSAFE)}
    shares = [(one["kept"], one["reviewed"], one["rows"]) for one in by_label.values() if one["reviewed"]]
    value, low, high = weighted_interval(shares) if shares else (None, None, None)
    return {**sums, "precision": {"value": value, "low": low, "high": high, "n": sums["reviewed"]}}


def _agreements(reviews: Sequence[Review], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Compare every two people by their decisions, and each with the expert by whether the instruction is right."""
    found = []
    for first, second in combinations(reviews, 2):
        both = {id: (one, second.decisions[id]) for id, one in first.decisions.items() if id in second.decisions}
        pairs = [(one.label, one.decision, other.decision) for one, other in both.values()]
        found.append(_agreement((first.reviewer, second.reviewer), pairs, (KEEP, WRONG, UNSAFE)))
    for review in reviews:
        # The filter judged only the instruction, because the safe response was written later.
        with_expert = [
            (one.label, WRONG if one.decision == WRONG else KEEP, KEEP if id in labels else WRONG)
            for id, one in review.decisions.items()
        ]
        found.append(_agreement((review.reviewer, EXPERT), with_expert, (KEEP, WRONG)))
    return found


def _agreement(names: tuple[str, str], pairs: Sequence[tuple[str, str, str]], classes: Sequence[str]) -> dict[str, Any]:
    """Return agreement and kappa over all (label, first's decision, second's), and for each label."""
    by_label: dict[str, list[tuple[str, str, str]]] = {}
    for pair in pairs:
        by_label.setdefault(pair[0], []).append(pair)
    return {
        "first": names[0],
        "second": names[1],
        **_agreed(pairs, classes),
        "by_label": {label: _agreed(some, classes) for label, some in sorted(by_label.items())},
    }


def _agreed(pairs: Sequence[tuple[str, str, str]], classes: Sequence[str]) -> dict[str, Any]:
    counts = Counter((mine, other) for _, mine, other in pairs)
    table = [[counts[first, second] for second in classes] for first in classes]
    # If one of them always decides the same, kappa would be 0 with an interval of zero width, so it is undefined.
    tells_apart = all(len({pair[who] for pair in pairs}) > 1 for who in (1, 2))
    kappa = cohens_kappa(table) if tells_apart else None
    return {
        "n": len(pairs),
        "agreed": sum(mine == other for _, mine, other in pairs),
        "kappa": None if kappa is None else dict(zip(("value", "low", "high"), kappa, strict=True)),
    }
