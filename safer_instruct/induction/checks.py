"""What drops an induced pair before a paid expert is asked about it."""

from __future__ import annotations

from safer_instruct.text.examples import Example, normalise
from safer_instruct.text.prompts import TEMPLATE_MARKS

CHECKS_VERSION = 2  # of cheap_check: part of the filter's configuration
COPY_WORDS = 8  # the shorter of instruction and response, as a whole in the other: from this many words on, a copy
MAX_INSTRUCTION_WORDS = 400  # more is a text, not an instruction


def cheap_check(pair: Example) -> str:
    """Return why an induced pair needs no expert to be dropped, "" if it does.

    Reasons: `induction_failed`, `truncated_instruction`, `empty_instruction`, `long_instruction`, `template_leak` (it
    holds a mark of a prompt's template), `copies_response` (the instruction is the response, or one of them holds the
    whole of the other and that is at least COPY_WORDS words long).
    """
    if pair.provenance.get("error"):
        return "induction_failed"
    if pair.provenance["truncated"]:
        return "truncated_instruction"
    instruction, response = normalise(pair.instruction or ""), normalise(pair.rejected or "")
    if not instruction:
        return "empty_instruction"
    if len(instruction.split()) > MAX_INSTRUCTION_WORDS:
        return "long_instruction"
    if any(mark in instruction for mark in TEMPLATE_MARKS):
        return "template_leak"
    shorter, longer = sorted((instruction, response), key=len)
    is_part = f" {shorter} " in f" {longer} " and len(shorter.split()) >= COPY_WORDS
    return "copies_response" if instruction == response or is_part else ""


def low_score(pair: Example, min_score: float | None) -> str:
    """Return why the round-trip score drops a pair: `low_round_trip`, `no_round_trip` (it has no score), or ""."""
    if min_score is None:
        return ""
    score = pair.provenance.get("round_trip")
    if score is None:
        return "no_round_trip"
    return "low_round_trip" if score < min_score else ""
