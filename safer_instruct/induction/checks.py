"""Checks that drop an induced pair before a paid expert sees it."""

from __future__ import annotations

from safer_instruct.text.examples import Example, normalise
from safer_instruct.text.prompts import TEMPLATE_MARKS

CHECKS_VERSION = 2  # version of cheap_check, recorded in the filter's configuration
COPY_WORDS = 8  # an instruction or response with at least this many words that is contained in the other is a copy
MAX_INSTRUCTION_WORDS = 400  # anything longer is a text, not an instruction


def cheap_check(pair: Example) -> str:
    """Return the reason to drop an induced pair without asking an expert, or "" if there is none.

    Reasons: `induction_failed`, `truncated_instruction`, `empty_instruction`, `long_instruction`, `template_leak` (it
    contains part of a prompt template), `copies_response` (instruction and response are equal, or one contains the
    other, which has at least COPY_WORDS words).
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
    """Return `low_round_trip` or `no_round_trip` (no score) if the round-trip score drops a pair, else ""."""
    if min_score is None:
        return ""
    score = pair.provenance.get("round_trip")
    if score is None:
        return "no_round_trip"
    return "low_round_trip" if score < min_score else ""
