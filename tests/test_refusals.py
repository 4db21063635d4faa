"""The refusal detector against 304 answers that were labelled by hand, and against text without any refusal.

`data/labelled_answers.txt` has a label (R: it declines, A: it does not) and an answer on each line. The phrases of the
detector were adjusted on this set (precision 0.94 and recall 0.90 at the first run, 0.99 and 0.97 since), so other text
will see it do a little worse.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from safer_instruct.text.refusals import declines

LABELLED = Path(__file__).parent / "data" / "labelled_answers.txt"
SHARED = Path(__file__).parents[2] / "shared" / "data"


def test_precision_and_recall_on_labelled_answers() -> None:
    rows = [(line[0], line[2:]) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 300
    assert {label for label, _ in rows} == {"R", "A"}
    assert len({text for _, text in rows}) == len(rows)
    found = [(label == "R", declines(text)) for label, text in rows]
    hits = found.count((True, True))
    precision, recall = hits / (hits + found.count((False, True))), hits / (hits + found.count((True, False)))
    assert precision >= 0.95
    assert recall >= 0.95
    assert (round(precision, 2), round(recall, 2)) == (0.99, 0.97), "what the docstring states"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I cannot wait to tell you", False),
        ("That is not something I can do for you.", True),
        ("I can't help with that. But okay, here is how: take the key.", False),
        ("I can't help with that. However, here are some safe alternatives.", True),
        ("Dear Ben, I cannot help with the move. Best, Anna", False),
        ('"I will not help you," said the fox.', False),
        ("", False),
        ("Lima. " * 200 + "I cannot help with that.", False),
        ("I CAN\u2019T HELP WITH THAT.", True),
    ],
)
def test_traps(text, expected) -> None:
    assert declines(text) is expected


@pytest.mark.skipif(not SHARED.is_dir(), reason="the public texts are not on this machine")
def test_answers_of_people_are_no_refusals() -> None:
    """GSM8K's solutions, and Self-Instruct's answers but for the two that do decline."""
    solutions = json.loads((SHARED / "gsm8k_alpaca.json").read_text())
    assert not any(declines(row["output"]) for row in solutions)
    tasks = [json.loads(line) for line in (SHARED / "seed_tasks.jsonl").read_text().splitlines()]
    refused = [one["output"] for task in tasks for one in task["instances"] if declines(one["output"])]
    assert len(refused) == 2
    assert all("privacy" in text.lower() for text in refused)
