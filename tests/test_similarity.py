"""Near duplicates and leaks, against the definition: the Jaccard index of word pairs over all pairs of texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import UserError
from safer_instruct.dataset.scratch import BATCH_ROWS, INT, TEXT, open_scratch, table_schema
from safer_instruct.dataset.similarity import BAND_ROWS, BANDS, LeakageGuard, find_near_duplicates, shingles
from safer_instruct.text.examples import Example, Message
from safer_instruct.text.exclusion import read_instruction_keys


def word_pairs(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + 2]) for i in range(len(words) - 1)} or {tuple(words)}


def jaccard(first: str, second: str) -> float:
    a, b = word_pairs(first), word_pairs(second)
    return len(a & b) / len(a | b)


def some_texts(count: int, seed: int) -> list[str]:
    """Random sentences, every third with an earlier one's words and a few of them changed."""
    draw = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(400)]
    texts: list[list[str]] = []
    for i in range(count):
        words = draw.choices(vocabulary, k=draw.randint(20, 40))
        if i % 3 == 2:
            words = list(draw.choice(texts))
            for _ in range(draw.randint(0, 5)):
                words[draw.randrange(len(words))] = draw.choice(vocabulary)
        texts.append(words)
    return [" ".join(words) for words in texts]


def literal(texts: list[str], threshold: float) -> list[bool]:
    kept: list[str] = []
    dropped = []
    for text in texts:
        dropped.append(any(jaccard(text, other) >= threshold for other in kept))
        if not dropped[-1]:
            kept.append(text)
    return dropped


def near_duplicates(
    texts: Sequence[str | Example], threshold: float, folder: Path, *, index: str = "memory"
) -> list[bool]:
    pairs = [Example("", text) if isinstance(text, str) else text for text in texts]
    with open_scratch(folder / "scratch", index) as scratch:
        find_near_duplicates(enumerate(pairs), threshold, scratch)
        dropped = {n for (n,) in scratch.rows("near_duplicates", ["n"])}
    assert not (folder / "scratch").exists()
    return [n in dropped for n in range(len(texts))]


@pytest.mark.parametrize("index", ["memory", "disk"])
def test_near_duplicates_are_those_of_the_definition(tmp_path, index) -> None:
    texts = some_texts(600, 1)
    found = numpy.array(near_duplicates(texts, 0.8, tmp_path, index=index))
    expected = numpy.array(literal(texts, 0.8))
    assert not (found & ~expected).any(), "a removal is verified, so there is no false one"
    assert expected.sum() > 60
    # LSH misses a pair of similarity 0.8 with probability 0.014, one of 0.9 hardly ever.
    assert (found & expected).sum() >= 0.97 * expected.sum()


RAIN = "Where does the rain come from that falls on the hills in the north of the country every winter?"
COINS = "Which of the two coins in my left pocket is worth more than the other one today, and to whom?"
SO = "Because warm air holds more water than cold air does, and gives it back where it has to rise."
NO = "By counting what is left over in the evening, and by writing it down before the night comes."
RULES = (
    f"You answer in whole sentences, you never say who you are, and you keep to what was asked of you: {RAIN} {COINS}"
)


def said(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[number % 2], text) for number, text in enumerate(texts))


# What was said before the pair, the pair, and whether it is nearly an earlier one: decided by reading them.
READ = [
    (Example("", "Why?", rejected=SO, history=said(RAIN, "From the sea.")), False),
    (Example("", "Why?", rejected=SO, history=said(COINS, "The old one.")), False),  # another question
    (Example("", "Why?", rejected=SO), False),
    (Example("", "why", rejected=SO.upper(), history=said(RAIN.replace("hills", "Hills"), "From the sea!")), True),
    (Example("", "Why?", rejected=SO, history=said(RAIN.replace("winter", "summer"), "From the sea.")), True),
    (Example("", "How?", rejected=NO, history=said(RAIN, "From the sea.")), False),  # goes on otherwise
    (Example("", "How?", rejected=NO, history=said(RAIN, "From the sea.", "Why?", SO)), False),
    (Example("", "Name one fruit.", rejected="An apple.", system=RULES), False),
    (Example("", "Say it again.", rejected="It again.", system=RULES), False),  # only the system prompt is the same
    (Example("", "Why?", rejected=SO + " Always."), True),
    (Example("", "Why?", rejected=SO, history=said("Rain?", "Yes.")), False),
    (Example("", "Why?", rejected=SO, history=said("Coins?", "No.")), False),  # most of the text is the same
    (Example("", "Why?", rejected=SO, history=said("rain", "yes")), True),
]


@pytest.mark.parametrize("index", ["memory", "disk"])
def test_pairs_of_conversations_are_compared_as_a_person_reads_them(tmp_path, index) -> None:
    pairs, expected = zip(*READ, strict=True)
    assert near_duplicates(pairs, 0.7, tmp_path, index=index) == list(expected)


def test_the_order_decides_who_stays(tmp_path) -> None:
    texts = [
        "a b c d e f g h i j k",
        "other words altogether here",
        "a b c d e f g h i j x",
        "A, b c d e f g h i j k!",
    ]
    assert near_duplicates(texts, 0.8, tmp_path) == [False, False, True, True]
    assert near_duplicates(["", "one", "?!", "One."], 0.8, tmp_path) == [False, False, True, True], "no words are equal"
    assert near_duplicates([], 0.8, tmp_path) == []


def test_a_chain_of_small_changes_is_cut_where_it_has_gone_too_far(tmp_path) -> None:
    """Each is near the one before, the third is far from the first: it stays, because the second one has gone."""
    words = [f"w{i}" for i in range(30)]
    chain = [" ".join([f"x{i}" for i in range(4 * step)] + words[4 * step :]) for step in range(3)]
    assert [jaccard(chain[0], chain[i]) >= 0.7 for i in (1, 2)] == [True, False]
    assert jaccard(chain[1], chain[2]) >= 0.7
    assert near_duplicates(chain, 0.7, tmp_path) == literal(chain, 0.7) == [False, True, False]


@given(st.lists(st.sampled_from("abcdef"), max_size=8), st.lists(st.sampled_from("abcdef"), max_size=8))
def test_similarity_is_the_jaccard_index_of_word_pairs(first, second) -> None:
    one, other = shingles(" ".join(first)), shingles(" ".join(second))
    if first and second:
        assert len(one & other) / len(one | other) == jaccard(" ".join(first), " ".join(second))
    assert bool(one) == bool(first)


def recall(similarity_of_pair: float) -> float:
    """The probability that two texts agree in all hashes of at least one band."""
    return 1 - (1 - similarity_of_pair**BAND_ROWS) ** BANDS


def test_the_probability_of_a_candidate() -> None:
    assert recall(0.8) > 0.98
    assert recall(0.9) > 0.9999
    assert recall(0.1) < 1e-5


def test_a_test_set_is_kept_out_exactly_and_nearly() -> None:
    test_set = ["how do i take the red pen from the desk of the clerk", "say one word"]
    guard = LeakageGuard(test_set, 0.6)
    assert guard.reason("say one word") == "excluded_instruction"
    assert guard.reason("how do i take the blue pen from the desk of the clerk") == "near_excluded_instruction"
    assert guard.reason("how do i take the blue cup from the shelf of a friend") == ""
    assert guard.reason("") == ""
    assert LeakageGuard(test_set, None).reason("how do i take the blue pen from the desk of the clerk") == ""
    for instruction in some_texts(200, 3):
        near = max(jaccard(instruction, other) for other in test_set) >= 0.6
        assert (guard.reason(instruction) != "") == near


@pytest.mark.parametrize("threshold", [None, 0.6])
def test_a_test_conversation_is_found_by_all_that_was_said(tmp_path, threshold) -> None:
    rows = [
        {"instruction": "Why?", "history": [[RAIN, "From the sea."]]},
        {"instruction": "Say one word", "input": "of mine", "history": []},
    ]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    guard = LeakageGuard(read_instruction_keys(tmp_path / "test.json"), threshold)
    near = "near_excluded_instruction" if threshold else ""
    assert {guard.reason_of(pair) for pair, _ in READ[1:3]} == {""}, "behind something else, and alone"
    assert guard.reason_of(READ[0][0]) == "excluded_instruction"
    assert guard.reason_of(READ[6][0]) == "excluded_instruction", "an earlier turn of it is the test set's"
    assert guard.reason_of(READ[4][0]) == near
    assert guard.reason_of(Example("", "say one word", "of mine", history=said(COINS, "No."))) == "excluded_instruction"
    (tmp_path / "test.json").write_text(json.dumps([{"instruction": "Why?", "history": "of France"}]))
    with pytest.raises(UserError, match=r"test.json:1: not_messages in column history: expected a list of messages"):
        list(read_instruction_keys(tmp_path / "test.json"))


def test_tables_give_back_their_rows_in_order(tmp_path) -> None:
    """The folder's name is a pattern to DuckDB, and would end a string in SQL; so would the texts."""
    rows = [(n, f"it's \0 {n}") for n in range(2 * BATCH_ROWS + 7)]
    with open_scratch(tmp_path / "run[1]*'", "disk") as scratch:
        scratch.create("texts", table_schema(n=INT, text=TEXT), rows)
        assert list(scratch.rows("texts", ["n", "text"])) == rows
        scratch.derive("reversed", "SELECT text, n + ? AS m FROM texts", 1, order="m DESC")
        assert list(scratch.rows("reversed", ["m", "text"])) == [(n + 1, text) for n, text in reversed(rows)]
        assert scratch.query("SELECT n, text FROM texts WHERE text = ?", "it's \0 9") == [rows[9]]
    assert not (tmp_path / "run[1]*'").exists()
