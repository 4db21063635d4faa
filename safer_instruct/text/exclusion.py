"""Which instructions may not be trained on: the one rule that training follows and evaluation reports by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import xxhash

from config.paths import find_path
from config.settings import DatasetSettings
from safer_instruct.text.examples import Example, normalise
from safer_instruct.text.prompts import reversed_target
from safer_instruct.text.readers import read_rows, require_columns

PUBLISHED_TEST_SET = "test_set.csv"  # its `si` prompts are also in the published training files


def instruction_key(instruction: str, input: str = "") -> str:
    """Return the form in which instructions are compared; Alpaca's `input` is part of the instruction."""
    return normalise(reversed_target(instruction, input))


def turn_keys(example: Example) -> list[str]:
    """Return the key of each of the user's turns. By the first one a conversation is split and recognised."""
    return [instruction_key(*turn) for turn in example.user_turns]


def exclude_file(settings: DatasetSettings) -> Path | None:
    """Find the file of instructions to keep out of training: `exclude`, else the test set beside published data."""
    if settings.exclude is not None:
        return find_path(settings.exclude) if settings.exclude else None
    path = find_path(settings.path)
    beside = (path if path.is_dir() else path.parent) / PUBLISHED_TEST_SET
    # Data that is itself called test_set.csv would otherwise exclude every one of its rows.
    return beside if settings.schema == "si" and beside.is_file() and beside != path else None


def read_instruction_keys(file: str | Path | None) -> Iterator[str]:
    """Yield the key of every instruction in a file; none without a file.

    Raises:
        UserError: The file is missing, or has no column `instruction`.
    """
    for where, row in read_rows(find_path(file)) if file else ():
        require_columns(row, ["instruction"], where)
        yield instruction_key(str(row["instruction"] or ""), str(row.get("input") or ""))


def key_hash(key: str) -> int:
    """Return 8 bytes for an instruction: a set of these is small beside one of texts."""
    return xxhash.xxh3_64_intdigest(key.encode("utf-8", "surrogatepass"))
