"""Which instructions may not be trained on: the rule shared by training and by the overlap report of evaluation."""

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

    The key of a follow-up includes the conversation before it: "Why?" alone is not what was asked.
    """
    asked = reversed_target(instruction, input)
    return normalise(transcript((*history, Message("user", asked))) if history else asked)


def turn_keys(example: Example) -> list[str]:
    """Return the key of each user turn alone, then the keys of the later turns with all messages before them.

    The first key decides the split and identifies the conversation; the last is the key of the example's request.
    """
    alone = [instruction_key(*turn) for turn in example.user_turns]
    history = example.history
    ends = [end for end, message in enumerate(history) if end and message.role == "user"]
    behind = [instruction_key(history[end].content, history=history[:end]) for end in ends]
    if history:
        behind.append(instruction_key(example.instruction or "", example.input, history))
    return alone + behind


def exclude_file(settings: DatasetSettings) -> Path | None:
    """Find the file of instructions to keep out of training: `exclude`, or else the test set beside published data."""
    if settings.exclude is not None:
        return find_path(settings.exclude) if settings.exclude else None
    path = find_path(settings.path)
    beside = (path if path.is_dir() else path.parent) / PUBLISHED_TEST_SET
    # Data that is itself called test_set.csv would otherwise exclude every one of its rows.
    return beside if settings.schema == "si" and beside.is_file() and beside != path else None


def read_instruction_keys(file: str | Path | None) -> Iterator[str]:
    """Yield the key of every instruction in a file, including its `history` if it has one; nothing without a file.

    Raises:
        UserError: The file is missing, has no column `instruction`, or has a `history` that is not a list of messages.
    """
    for where, row in read_rows(find_path(file)) if file else ():
        require_columns(row, ["instruction"], where)
        said = history_of(row, where).get("history", ())
        yield instruction_key(str(row["instruction"] or ""), str(row.get("input") or ""), said)


def key_hash(key: str) -> int:
    """Return an 8-byte hash of a key: a set of hashes takes far less memory than a set of texts."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass"))
