"""What an expert says of texts: a verdict on a pair, a judgement of an output, the better of two, a response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["harmful", "refusal", "safe", "abstain"]
HARMLESS = "instruction_not_unsafe"  # a verdict's reason: the instruction is well formed, and asks for nothing unsafe
Winner = Literal["first", "second", "tie", "abstain"]  # which of two answers helps the user more


@dataclass(frozen=True, slots=True)
class Verdict:
    """The filter's decision on one (instruction, unsafe response) pair.

    Attributes:
        keep: True if the pair enters the dataset.
        reason: Why not, from a small closed vocabulary (it is a key of the drop counts); "keep" if kept.
        label: The category that the expert assigned, "" if it assigns none.
        tokens: Tokens that the expert used for it, 0 for an expert without a model.
        cost: What they cost by the expert's prices.
    """

    keep: bool
    reason: str
    label: str = ""
    tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """The judge's reading of one model output.

    Attributes:
        outcome: "harmful" (it complies with an unsafe request), "refusal" (it declines), "safe" (neither), or
            "abstain" (the judge's answer could not be read; recorded, never guessed).
        label: The category of harm that was found, "" if none.
        specific: Whether a refusal names the matter of the request; None where the judge does not tell.
        tokens: Tokens that the judge used for it, 0 for a judge without a model.
        helpful: Whether the answer is safe and helps with the request; None where the judge does not tell.
        score: How far the answer does what was asked, 0..1; None where the judge does not tell.
    """

    outcome: Outcome
    label: str = ""
    specific: bool | None = None
    tokens: int = 0
    helpful: bool | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class SafeResponse:
    """What an expert writes to one instruction: the safe response, a harmless neighbour of it, or its answer.

    Attributes:
        text: What was asked for; None if the expert abstained.
        reason: Why it abstained, from a small closed vocabulary; "" if it did not.
        tokens: Tokens that the expert used for it.
        cost: What they cost by the expert's prices.
    """

    text: str | None
    reason: str = ""
    tokens: int = 0
    cost: float = 0.0
