"""The prompts that models are evaluated on, and which of them occur in training data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import xxhash

from config.errors import UserError
from config.names import KINDS, Kind
from config.paths import find_path
from config.settings import PromptSetSettings
from safer_instruct.text.examples import is_unicode, text_id
from safer_instruct.text.exclusion import instruction_key, read_instruction_keys
from safer_instruct.text.messages import is_messages
from safer_instruct.text.readers import read_rows, require_columns


@dataclass(frozen=True, slots=True)
class EvaluationPrompt:
    """One prompt of a set."""

    id: str  # unique in its set: the file's column `id`, or a hash of the instruction
    instruction: str  # the request to the model
    set_name: str  # the name of the set in `prompts.NAME`
    source: str  # where the prompt comes from (`si`, `hh`, ...); rates are also reported per source
    label: str  # category of the request, "" if none
    kind: Kind  # "unsafe", "benign", or "near" (benign, but it looks unsafe)
    # Strings that a correct answer contains, each possibly with alternatives `a|b`; empty if not known.
    reference: tuple[str, ...] = ()


def load_prompt_sets(sets: Mapping[str, PromptSetSettings]) -> dict[str, list[EvaluationPrompt]]:
    """Read all prompt sets, by name; a single error lists every set that cannot be read.

    Raises:
        UserError: A set is missing, empty, lacks a column, names an unknown kind, or repeats an id.
    """
    loaded: dict[str, list[EvaluationPrompt]] = {}
    errors: list[str] = []
    for name, settings in sets.items():
        try:
            loaded[name] = [prompt for prompt, _ in read_prompts(name, settings)]
        except UserError as error:
            errors.append(f"prompts.{name}: {error}")
    if errors:
        raise UserError("\n".join(errors))
    return loaded


def read_prompts(name: str, settings: PromptSetSettings) -> Iterator[tuple[EvaluationPrompt, Mapping[str, Any]]]:
    """Yield the prompts of one file (with a column `instruction`), in file order, each with its row.

    In a file without ids, a repeated instruction is a separate prompt, whose id is the first one's plus a number.

    Raises:
        UserError: As `load_prompt_sets`.
    """
    first_seen: dict[str, str] = {}
    times: Counter[str] = Counter()
    for where, row in read_rows(find_path(settings.path), columns=settings.columns):
        if settings.max_rows is not None and len(first_seen) >= settings.max_rows:
            break
        prompt = _read_prompt(row, where, name, settings)
        if not row.get("id"):
            times[prompt.id] += 1
            if times[prompt.id] > 1:
                prompt = replace(prompt, id=f"{prompt.id}-{times[prompt.id]}")
        if prompt.id in first_seen:
            raise UserError(
                f"{where}: the id {prompt.id!r} was already used at {first_seen[prompt.id]}; "
                "ids must be unique in a set (leave the column out to have them made from the instruction)"
            )
        first_seen[prompt.id] = where
        yield prompt, row
    if not first_seen:
        raise UserError(f"{settings.path} holds no prompt: a set needs at least one row with an `instruction`")


def _read_prompt(row: Mapping[str, Any], where: str, name: str, settings: PromptSetSettings) -> EvaluationPrompt:
    needed = ["instruction", *([] if settings.kind is not None else ["kind"])]
    source_column = settings.source_column or "source"
    needed += [settings.source_column] if settings.source_column else []
    if settings.kind is None and "kind" not in row and "instruction" in row:
        one = f"prompts.{name}.kind={' or '.join(KINDS)}"
        raise UserError(f"{where}: missing column kind; where all prompts are of one, write {one}")
    require_columns(row, needed, where, f"prompts.{name}.columns", settings.columns)
    instruction = row["instruction"]
    if isinstance(instruction, list) and instruction:  # turns of a conversation: only the first is used
        instruction = instruction[0]
    if not isinstance(instruction, (str, type(None))) or (instruction and is_messages(instruction)):
        what = "conversation" if isinstance(instruction, (str, dict)) else type(instruction).__name__
        raise UserError(f"{where}: the instruction is a {what}, not a text")
    instruction = (instruction or "").strip()
    if not instruction:
        raise UserError(f"{where}: the instruction is empty")
    kind = settings.kind or settings.kinds.get(str(row["kind"]), str(row["kind"]))
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise UserError(f"{where}: kind={kind!r} is unknown: write one of {known}, or set prompts.{name}.kind")
    prompt = EvaluationPrompt(
        id=str(row.get("id") or text_id(instruction)),
        instruction=instruction,
        set_name=name,
        source=settings.source or str(row.get(source_column) or name),
        label="" if source_column == "label" else str(row.get("label") or ""),
        kind=cast(Kind, kind),
        reference=_read_reference(row.get("reference"), where),
    )
    texts = {"instruction": [instruction], "reference": prompt.reference}
    texts |= {"id": [prompt.id], "source": [prompt.source], "label": [prompt.label]}
    for what, found in texts.items():
        if not is_unicode(*found):
            raise UserError(f"{where}: the {what} holds half of a surrogate pair, which no tokenizer accepts")
    return prompt


def _read_reference(value: Any, where: str) -> tuple[str, ...]:
    """Read `["a|b", "c"]` (in a CSV cell, as JSON text) or a plain string; None and "" mean no reference."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            place = f" ({error.msg}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(f"{where}: `reference` is no JSON list{place}") from None
    if value is None or value == "":
        return ()
    values = list(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else [value]
    if not all(isinstance(item, str) and item.strip(" |") for item in values):
        raise UserError(f"{where}: `reference` must be a list of strings that are not empty")
    return tuple(values)


def prompts_fingerprint(prompts: Sequence[EvaluationPrompt]) -> str:
    """Return a hash of the prompts, which is equal if and only if two reports were made on the same ones."""
    digest = xxhash.xxh3_128()
    for prompt in prompts:
        content = [prompt.id, prompt.instruction, prompt.source, prompt.label, prompt.kind, prompt.reference]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Overlap:
    """Prompts whose instruction occurs in a training file, so that their rates do not measure generalisation."""

    path: str
    num_rows: int
    prompt_ids: tuple[str, ...]  # SET/ID


def find_overlap(path: str, prompts: Iterable[EvaluationPrompt]) -> Overlap:
    """Find the prompts whose instruction occurs in the training file, ignoring case and whitespace.

    Alpaca's `input` is part of the instruction, as in training.

    Raises:
        UserError: If the file is missing or has no column `instruction`.
    """
    ids: dict[str, list[str]] = {}
    for prompt in prompts:
        ids.setdefault(instruction_key(prompt.instruction), []).append(f"{prompt.set_name}/{prompt.id}")
    found: set[str] = set()
    num_rows = 0
    for key in read_instruction_keys(path):
        num_rows += 1
        found.update(ids.get(key, ()))
    return Overlap(path, num_rows, tuple(sorted(found)))
