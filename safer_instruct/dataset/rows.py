"""The rows of any dataset in the schema of `si`, ours or a published one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from config.paths import find_path
from safer_instruct.text.examples import text_id
from safer_instruct.text.readers import read_rows, require_columns

TEXT_COLUMNS = ("instruction", "rejected", "chosen")
UNLABELLED = "(none)"


def dataset_rows(path: str) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Yield (place, row, its texts), empty ones as ""."""
    for n, (where, row) in enumerate(read_rows(find_path(path))):
        if n == 0:
            require_columns(row, ["instruction", "chosen"], where)
        yield where, row, {column: str(row.get(column) or "").strip() for column in TEXT_COLUMNS}


def row_label(row: Mapping[str, Any]) -> str:
    """Return the category of a row, UNLABELLED where it has none."""
    # A lone surrogate, which JSON can hold, is no UTF-8.
    return str(row.get("label") or UNLABELLED).encode("utf-8", "backslashreplace").decode()


def row_id(row: Mapping[str, Any], texts: Mapping[str, str]) -> str:
    """Return the id of a row, a hash of its texts where it has none."""
    return str(row.get("id") or text_id(*texts.values()))
