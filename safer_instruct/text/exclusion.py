"""Which instructions may not be trained on: the one rule that training follows and evaluation reports by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import xxhash

from config.paths import find_path
from config.settings import DatasetSettings
from safer_instruct.text.examples import Example, Message, normalise, transcript
from safer_instruct.text.messages import Messages, history_of
from safer_instruct.text.prompts import reversed_target
from safer_instruct.text.readers import read_rows, require_columns

PUBLISHED_TEST_SET = "test_set.csv"  # its `si` prompts are also in the published training files


def instruction_key(instruction: str, input: str = "", history: Messages = ()) -> str:
    """Return the form in which instructions are compared; Alpaca's `input` is part of the instruction.

    One that goes on with a conversation is the conversation up to it: "Why?" alone is not what was asked.
    """
    asked = reversed_target(instruction, input)
    return normalise(transcript((*history, Message("user", asked))) if history else asked)


def turn_keys(example: Example) -> list[str]:
    """Return the key of each of the user's turns alone, then those of later ones behind all that was said before them.

    By the first a conversation is split and recognised; the last is the key of what the example asks.
    """
    alone = [instruction_key(*turn) for turn in example.user_turns]
    history = example.history
    ends = [end for end, message in enumerate(history) if end and message.role == "user"]
    behind = [instruction_key(history[end].content, history=history[:end]) for end in ends]
    if history:
        behind.append(instruction_key(example.instruction or "", example.input, history))
    return alone + behind


def exclude_file(settings: DatasetSettings) -> Path | None:
    """Find the file of instructions to keep out of training: `exclude`, else the test set beside published data."""
    if settings.exclude is not None:
        return find_path(settings.exclude) if settings.exclude else None
    path = find_path(settings.path)
    beside = (path if path.is_dir() else path.parent) / PUBLISHED_TEST_SET
    # Data that is itself called test_set.csv would otherwise exclude every one of its rows.
    return beside if settings.schema == "si" and beside.is_file() and beside != path else None


def read_instruction_keys(file: str | Path | None) -> Iterator[str]:
    """Yield the key of every instruction in a file, behind its `history` if it has one; none without a file.

    Raises:
        UserError: The file is missing, or has no column `instruction`, or a `history` that is no list of messages.
    """
    for where, row in read_rows(find_path(file)) if file else ():
        require_columns(row, ["instruction"], where)
        said = history_of(row, where).get("history", ())
        yield instruction_key(str(row["instruction"] or ""), str(row.get("input") or ""), said)


def key_hash(key: str) -> int:
    """Return 8 bytes for an instruction: a set of these is small beside one of texts."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass"))
