"""Read the rows of any dataset in the schema of `si`, ours or a published one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.paths import find_path
from safer_instruct.text.examples import Example, text_id
from safer_instruct.text.messages import history_of
from safer_instruct.text.prompts import reversed_target
from safer_instruct.text.readers import read_rows, require_columns

TEXT_COLUMNS = ("instruction", "rejected", "chosen")
UNLABELLED = "(none)"


def dataset_rows(path: str) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Yield (place, row, its texts), with "" for a missing text; a column `input` becomes part of the instruction."""
    for n, (where, row) in enumerate(read_rows(find_path(path))):
        if n == 0:
            require_columns(row, ["instruction", "chosen"], where)
        for column in (*TEXT_COLUMNS, "input"):
            if not isinstance(row.get(column), str | None):
                raise UserError(f"{where}: the column {column} holds a {type(row[column]).__name__}, not a text")
        texts = {column: (row.get(column) or "").strip() for column in TEXT_COLUMNS}
        if texts["instruction"]:
            texts["instruction"] = reversed_target(texts["instruction"], str(row.get("input") or "").strip())
        yield where, row, texts


def row_label(row: Mapping[str, Any]) -> str:
    """Return the category of a row, UNLABELLED where it has none."""
    return unicode(str(row.get("label") or UNLABELLED))


def unicode(text: str) -> str:
    """Return a text that can be written: a lone surrogate, which JSON can hold and UTF-8 cannot, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def row_example(where: str, row: Mapping[str, Any], texts: Mapping[str, str]) -> Example:
    """Return a row of `dataset_rows` as an Example with its history; if it has no id, the id is a hash of its texts.

    Raises:
        UserError: Its column `history` is not a valid history (training treats it as a bad row).
    """
    told = history_of(row, where)
    instruction, rejected, chosen = (texts[column] for column in TEXT_COLUMNS)
    label, source = str(row.get("label") or ""), {"source": Path(where).name}
    example = Example("", instruction, "", chosen, rejected, label, source, **told)
    said = (text for message in example.before for text in message)
    return replace(example, id=str(row.get("id") or text_id(*texts.values(), *said)))
