"""Shallow means that tell chosen from rejected: planted ones are measured, and none is seen where there is none."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from config.settings import DuplicatesSettings
from safer_instruct.dataset.audit import audit
from safer_instruct.dataset.audit_report import render_audit
from safer_instruct.dataset.similarity import LeakageGuard
from safer_instruct.measures.shortcuts import MEANS, auc, shortcuts

WORDS = [f"word{i}" for i in range(300)]
Row = tuple[str, str, str, str]


def text(draw: random.Random, *, more: int = 0) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(5, 15) + more))


def rows(n: int, seed: int = 0, *, start: str = "", share: float = 0.0, longer: int = 0) -> list[Row]:
    """Pairs of one distribution, but that a share of the chosen texts begins with `start` or is `longer`."""
    draw = random.Random(seed)
    found = []
    for i in range(n):
        planted = draw.random() < share
        chosen = (start if planted else "") + text(draw, more=longer if planted else 0)
        found.append((f"ask {i}", "ab"[i % 2], chosen, text(draw)))
    return found


@pytest.mark.parametrize(
    ("names", "start", "share"),
    [
        (["refusal_phrase"], "I cannot help with that. ", 0.4),
        (["first_words"], "Seven green hats ", 0.6),
        (["bag_of_words"], "Seven green hats ", 0.8),
        (["refusal_phrase", "first_words", "bag_of_words"], "I'm sorry, but I can't help with that. ", 1.0),
    ],
)
def test_a_planted_shortcut_is_measured(names, start, share) -> None:
    """A share q of the chosen texts has what no rejected text has, the rest is alike: the AUC is q + (1 - q) / 2."""
    planted = rows(4000, start=start, share=share)
    truth = 0.5 + sum(chosen.startswith(start) for _, _, chosen, _ in planted) / (2 * len(planted))
    found = shortcuts(planted)
    for name in names:
        assert found[name][""].value == pytest.approx(truth, abs=0.02)
        assert found[name]["a"].n == 2000
        assert found[name][""].is_shortcut == (truth > 0.95)


def test_a_planted_length_is_measured() -> None:
    """All chosen texts are 4 words longer: P(U + 4 > V) + P(U + 4 = V) / 2 for U, V uniform over 11 lengths."""
    truth = sum((u + 4 > v) + (u + 4 == v) / 2 for u in range(11) for v in range(11)) / 121
    found = shortcuts(rows(4000, longer=4, share=1.0))
    assert found["length"][""].value == pytest.approx(truth, abs=0.02)
    assert shortcuts([(a, b, d, c) for a, b, c, d in rows(4000, longer=30, share=1.0)])["length"][""].is_shortcut


def test_without_a_shortcut_the_interval_holds_one_half() -> None:
    found = shortcuts(rows(2000, seed=3))
    for name in MEANS:
        one = found[name][""]
        assert one.low is not None
        assert one.low <= 0.5 <= one.high, name
        assert one.high - one.low < 0.08


def test_the_interval_covers_one_half_as_often_as_it_says() -> None:
    """Over 400 draws with correlated pairs, 95% +- 3 standard errors of intervals hold 0.5."""
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        shared, own = draw.normal(size=(1, 60)), draw.normal(size=(2, 60))
        one = auc(*np.round(shared + own, 1))
        covered += one.low <= 0.5 <= one.high
    assert 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5 <= covered / 400 <= 0.95 + 3 * (0.95 * 0.05 / 400) ** 0.5


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    draw = np.random.default_rng(1)
    chosen, rejected = draw.integers(0, 9, 37).astype(float), draw.integers(0, 8, 37).astype(float)
    brute = np.mean([(c > r) + (c == r) / 2 for c in chosen for r in rejected])
    assert auc(chosen, rejected).value == pytest.approx(brute, abs=1e-12)


def test_few_pairs_have_wide_intervals() -> None:
    assert auc(np.empty(0), np.empty(0)).value is None
    assert auc(np.array([1.0]), np.array([0.0])) == auc(np.array([2.0]), np.array([1.0]))
    assert auc(np.array([1.0]), np.array([0.0])).low == 0.0
    perfect = auc(np.arange(10.0) + 50, np.arange(10.0))
    assert perfect.value == 1.0
    assert 0.6 < (perfect.low or 0) < 0.8
    assert not any(one[""].is_shortcut for one in shortcuts([]).values())


def report_of(path: Path, pairs: list[Row]) -> dict:
    keys = ("instruction", "label", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(keys, pair, strict=True))) + "\n" for pair in pairs))
    exact = DuplicatesSettings(threshold=None)
    return audit(str(path), guard=LeakageGuard([], None), duplicates=exact, max_same_chosen=None, output=None)


def test_the_audit_says_what_is_wrong_in_one_sentence(tmp_path) -> None:
    bad = report_of(tmp_path / "bad.jsonl", rows(200, start="I'm sorry, but I can't help with that. ", share=1.0))
    shown = render_audit(bad)
    assert "**Chosen and rejected are told apart by refusal phrase (AUC 1.00 [" in shown
    assert shown.count("told apart by refusal phrase") == 1
    assert "(the chosen response does not decline): 0 of 200 (0.0%). A model trained on this dataset alone" in shown
    assert bad["by_label"]["a"]["answered"] == 0
    assert "sorry" not in json.dumps(bad)
    good = report_of(tmp_path / "good.jsonl", rows(200))
    shown = render_audit(good)
    assert "told apart by refusal" not in shown
    assert "A model trained on this dataset alone" not in shown
    assert good["total"]["answered"] == 200
    assert good["shortcuts"]["length"]["b"]["n"] == 100
