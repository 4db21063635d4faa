"""A conversation as the answers in it: each with all that was said before, and their tokens as one sequence again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from safer_instruct.text.encoding import EncodedRow
from safer_instruct.text.examples import Example


def each_answer(example: Example) -> list[Example]:
    """Return an example for each of the assistant's messages, in order; the last one is the example itself.

    What a user says twice in a row, unanswered, stays in the history of the answer behind it.
    """
    answers = [
        replace(example, instruction=asked.content, input="", chosen=answer.content, history=example.history[:number])
        for number, (asked, answer) in enumerate(zip(example.history, example.history[1:], strict=False))
        if (asked.role, answer.role) == ("user", "assistant")
    ]
    return [*answers, example]


def join_answers(rows: Sequence[EncodedRow]) -> Iterator[EncodedRow]:
    """Join the answers of a conversation into one row wherever a prompt goes on from where the answer before it ended.

    Each answer stands behind exactly the tokens that a model would be asked with, so the joined row trains what a row
    for each answer would, and computes the conversation once. A template that writes earlier answers otherwise than
    the last one (without their thoughts, without an end) makes a row for each answer.

    Args:
        rows: Of one response each, in the order of the conversation.

    Yields:
        rows whose response holds `~t` for a token t that is given between two answers, and is no target.
    """
    joined: EncodedRow | None = None
    tokens: list[int] = []  # of `joined`
    for row in rows:
        (response,) = row.responses
        if joined is not None and row.prompt[: len(tokens)] == tokens:
            given = [~token for token in row.prompt[len(tokens) :]]
            joined = replace(
                joined,
                responses=([*joined.responses[0], *given, *response],),
                responses_cut=row.responses_cut,
                straddled=joined.straddled + row.straddled,
            )
        else:
            if joined is not None:
                yield joined
            joined = row
        tokens = [*row.prompt, *response]
    if joined is not None:
        yield joined
