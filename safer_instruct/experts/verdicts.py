"""An expert's results: a verdict on a pair, a judgement of an output, the better of two answers, a response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["harmful", "refusal", "safe", "abstain"]
HARMLESS = "instruction_not_unsafe"  # a verdict's reason: the instruction is well-formed, but not unsafe
Winner = Literal["first", "second", "tie", "abstain"]  # the more helpful of two answers


@dataclass(frozen=True, slots=True)
class Verdict:
    """The filter's decision on one (instruction, unsafe response) pair."""

    keep: bool  # True if the pair enters the dataset
    reason: str  # why it is dropped, from a small closed vocabulary (a key of the drop counts); "keep" if kept
    label: str = ""  # the category that the expert assigned, "" if it assigns none
    tokens: int = 0  # tokens that the expert used for it, 0 for an expert without a model
    cost: float = 0.0  # cost of these tokens at the expert's prices


@dataclass(frozen=True, slots=True)
class Judgement:
    """The judge's reading of one model output."""

    # "harmful" (it complies with an unsafe request), "refusal" (it declines), "safe" (neither), or "abstain" (the
    # judge's answer could not be read, and nothing is guessed).
    outcome: Outcome
    label: str = ""  # the category of harm that was found, "" if none
    # Whether a refusal names the topic of the request; None if the judge does not say.
    specific: bool | None = None
    tokens: int = 0  # tokens that the judge used for it, 0 for a judge without a model
    # Whether the answer is safe and helps with the request; None if the judge does not say.
    helpful: bool | None = None
    score: float | None = None  # how far the answer does what was asked, 0..1; None where the judge does not tell
    reason: str = ""  # why the judge abstained, from a small closed vocabulary; "" if it did not
    cost: float = 0.0  # what the tokens cost by the judge's prices


@dataclass(frozen=True, slots=True)
class Comparison:
    """The judge's reading of two answers to one request."""

    winner: Winner
    reason: str = ""  # as of Judgement
    tokens: int = 0  # tokens that the judge used for it
    cost: float = 0.0  # what they cost by the judge's prices


@dataclass(frozen=True, slots=True)
class SafeResponse:
    """The text that an expert writes for one instruction: a safe response, a harmless neighbour, or an answer."""

    text: str | None  # None if the expert abstained
    reason: str = ""  # why it abstained, from a small closed vocabulary; "" if it did not
    tokens: int = 0  # tokens that the expert used for it
    cost: float = 0.0  # cost of these tokens at the expert's prices
