"""Answers of a model that cannot be used: why, and when there are too many of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from config.errors import UserError
from safer_instruct.experts.verdicts import Judgement
from safer_instruct.generation.completions import Generation

FIRST = 30  # answers of a call: if none of them can be used, those behind them will hardly be better
# Of reasons that begin so nothing came at all, and what asks the model sees to it.
NOT_ANSWERED = ("http_", "malformed_reply", "no_connection", "timeout", "unfinished")

T = TypeVar("T")


def abstention(generation: Generation) -> str:
    """Return why there is no answer: one of a few words, for the counts."""
    if generation.error:
        return f"abstain_{generation.error}"
    if generation.truncated:
        return "abstain_truncated"
    return "abstain_unreadable" if generation.text.strip() else "abstain_empty"


def judgement_of(generation: Generation, read: Judgement | None) -> Judgement:
    """Return what a judge's answer reads as, or its abstention, with what it cost."""
    judgement = read or Judgement("abstain", reason=abstention(generation))
    return replace(judgement, tokens=generation.tokens, cost=generation.cost)


def stop_if_mute(name: str, answers: Iterable[tuple[Generation, T | None]]) -> Iterator[tuple[Generation, T | None]]:
    """Yield what came back and how it reads (None: it cannot be used).

    Raises:
        UserError: None of the first ones could be used.
    """
    reasons: Counter[str] | None = Counter()
    for generation, read in answers:
        yield generation, read
        if read is not None:
            reasons = None
        elif reasons is not None and not generation.error.startswith(NOT_ANSWERED):
            reasons[abstention(generation)] += 1
            if reasons.total() == FIRST:
                counts = ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())
                raise UserError(
                    f"{name} gave no answer that can be used to any of the first {FIRST} rows ({counts}), so nothing "
                    "more is asked. truncated: raise its max_new_tokens; unreadable: it does not keep to the form that "
                    "it is asked for, and a larger model may (docs/faq.md). These rows are kept as abstentions"
                )
