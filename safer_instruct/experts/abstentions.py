"""Say why an answer of a model cannot be used, and stop when none of the first ones can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from config.errors import UserError
from safer_instruct.experts.verdicts import Judgement
from safer_instruct.generation.completions import Generation

FIRST = 30  # answers of a call; if none of them can be used, later ones hardly will
# Reasons that begin like this mean that no answer came; the client deals with those.
NOT_ANSWERED = ("http_", "malformed_reply", "no_connection", "timeout", "unfinished")

T = TypeVar("T")


def abstention(generation: Generation) -> str:
    """Return the reason for an abstention, one of a few words that can be counted."""
    if generation.error:
        return f"abstain_{generation.error}"
    if generation.truncated:
        return "abstain_truncated"
    return "abstain_unreadable" if generation.text.strip() else "abstain_empty"


def judgement_of(generation: Generation, read: Judgement | None) -> Judgement:
    """Return a judge's verdict, or an abstention, with the tokens and cost of the answer."""
    judgement = read or Judgement("abstain", reason=abstention(generation))
    return replace(judgement, tokens=generation.tokens, cost=generation.cost)


def stop_if_mute(name: str, answers: Iterable[tuple[Generation, T | None]]) -> Iterator[tuple[Generation, T | None]]:
    """Pass on each answer with what was read from it (None: it cannot be used).

    Raises:
        UserError: None of the first `FIRST` answers can be used.
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
                    f"{name}: none of the first {FIRST} answers can be used ({counts}), so it is not asked further. If "
                    "they are truncated, raise expert.max_new_tokens (or expert.generation.max_new_tokens); if "
                    "unreadable, try a larger model (docs/faq.md). These rows stay abstentions"
                )
