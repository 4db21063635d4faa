"""Induce, filter, respond: each a function from Examples to ledger records, cheap checks before paid ones.

Records hold an `id` and what the stage found out; texts of the corpus are not copied into them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from config.errors import UserError
from config.settings import GenerationSettings
from safer_instruct.examples import Example, normalise, text_id
from safer_instruct.experts import Expert
from safer_instruct.generation import Request, TextGenerator
from safer_instruct.ledger import Record
from safer_instruct.prompts import render_reversed

INDUCE, FILTER, RESPOND = "induce", "filter", "respond"
STAGES = (INDUCE, FILTER, RESPOND)
CHECKS_VERSION = 1  # of cheap_check: part of the filter's configuration
COPY_WORDS = 8  # an instruction that shares so many words in a row with its response, as a whole, copies it
ROWS_AT_A_TIME = 4096  # what is sorted by length together


def stage_induce(generator: TextGenerator) -> Callable[[Sequence[Example]], Iterator[Record]]:
    """Make the stage that lets the reversed model write the instruction of each response."""

    def run(examples: Sequence[Example]) -> Iterator[Record]:
        texts = {example.id: example.rejected or "" for example in examples}
        for generation in generator.generate([Request(id, render_reversed(text)) for id, text in texts.items()]):
            yield {
                "id": generation.id,
                "response": text_id(texts[generation.id]),  # a corpus that changed under its ids is noticed
                "instruction": generation.text.strip(),
                "truncated": generation.truncated,
                "prompt_cut": generation.prompt_cut,
                "tokens": generation.prompt_tokens + generation.new_tokens,
                **({"error": generation.error} if generation.error else {}),
            }

    return run


def stage_filter(expert: Expert) -> Callable[[Sequence[Example]], Iterator[Record]]:
    """Make the stage that decides which pairs are kept: cheap checks first, the expert for what passes them."""

    def run(examples: Sequence[Example]) -> Iterator[Record]:
        passed = []
        for example in examples:
            if reason := cheap_check(example):
                yield {"id": example.id, "keep": False, "reason": reason, "label": "", "tokens": 0}
            else:
                passed.append(example)
        for id, verdict in expert.screen(passed):
            yield {
                "id": id,
                "keep": verdict.keep,
                "reason": verdict.reason,
                "label": verdict.label,
                "tokens": verdict.tokens,
            }

    return run


def stage_respond(expert: Expert) -> Callable[[Sequence[Example]], Iterator[Record]]:
    """Make the stage in which the expert answers each kept instruction safely."""

    def run(examples: Sequence[Example]) -> Iterator[Record]:
        for id, response in expert.respond(examples):
            yield {"id": id, "chosen": response.text, "reason": response.reason, "tokens": response.tokens}

    return run


def cheap_check(pair: Example) -> str:
    """Return why an induced pair needs no expert to be dropped, "" if it does.

    Reasons: `induction_failed`, `truncated_instruction`, `empty_instruction`, `copies_response` (the instruction is
    the response, or one of them holds the whole of the other and that is at least COPY_WORDS words long).
    """
    if pair.provenance.get("error"):
        return "induction_failed"
    if pair.provenance["truncated"]:
        return "truncated_instruction"
    instruction, response = normalise(pair.instruction or ""), normalise(pair.rejected or "")
    if not instruction:
        return "empty_instruction"
    shorter, longer = sorted((instruction, response), key=len)
    is_part = f" {shorter} " in f" {longer} " and len(shorter.split()) >= COPY_WORDS
    return "copies_response" if instruction == response or is_part else ""


def with_instructions(examples: Sequence[Example], records: Mapping[str, Record]) -> list[Example]:
    """Join the corpus with the induce stage's records.

    Raises:
        UserError: Rows that have no record, or whose response has changed since.
    """
    require_records(examples, records, INDUCE)
    return [_with_instruction(example, records[example.id]) for example in examples]


def _with_instruction(example: Example, record: Record) -> Example:
    if record["response"] != text_id(example.rejected or ""):
        raise UserError(
            f"row {example.id} ({example.provenance['source']}): the corpus has changed since its instruction was "
            "induced; give the old corpus.path, or another output=FOLDER"
        )
    found = {"truncated": record["truncated"], "error": record.get("error", "")}
    return replace(example, instruction=record["instruction"], provenance={**example.provenance, **found})


def kept(examples: Sequence[Example], records: Mapping[str, Record]) -> list[Example]:
    """Return the examples that the filter stage kept.

    Raises:
        UserError: Rows that have no record.
    """
    require_records(examples, records, FILTER)
    return [example for example in examples if records[example.id]["keep"]]


def require_records(examples: Sequence[Example], records: Mapping[str, Record], stage: str) -> None:
    """Raise a UserError that counts the rows which a stage has not finished."""
    num_missing = sum(example.id not in records for example in examples)
    if num_missing:
        raise UserError(
            f"{num_missing} of {len(examples)} rows have no result of stage={stage} yet; run it to its end first "
            f"(the same command with stage={stage}): it goes on where it stopped"
        )


def induce_configuration(name: str, fingerprint: str, generation: GenerationSettings) -> dict[str, Any]:
    """Return what the records of the induce stage depend on, for the header of its ledger."""
    return {
        "model": name,
        "model_fingerprint": fingerprint,
        "prompt": _digest(render_reversed("").text),
        "generation.max_new_tokens": generation.max_new_tokens,
        "generation.temperature": generation.temperature,
        "generation.top_p": generation.top_p,
        "generation.seed": generation.seed,
    }


def expert_configuration(expert: Expert, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the records of an expert's stage depend on, the configuration of the stage before included."""
    return {
        "expert": expert.name,
        "expert_fingerprint": expert.fingerprint,
        "checks": CHECKS_VERSION,
        "stage_before": _digest(repr(sorted(before.items()))),
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
