"""The corpus of unsafe responses, as Examples whose `rejected` is known."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.paths import find_path
from config.settings import CorpusSettings
from safer_instruct.examples import Example, in_shard, read_rows, require_columns, text_id


@dataclass(frozen=True)
class Corpus:
    """The usable rows of one shard, in the order of the file, and what became of the others.

    Attributes:
        examples: Rows with `id`, `rejected`, `label` and provenance ("corpus.csv:17").
        num_rows: Rows of the shard that were read, usable or not.
        dropped: Reason -> number of rows of the shard that were dropped.
        dropped_at: Reason -> where the first few of them are (file:line, never text).
    """

    examples: list[Example]
    num_rows: int
    dropped: Counter[str]
    dropped_at: dict[str, list[str]]


MAX_PLACES = 10


def read_corpus(settings: CorpusSettings, *, index: int = 0, count: int = 1) -> Corpus:
    """Read one shard of the corpus.

    Rows without a response, with one that is no text, and repetitions of an id or a response are dropped and counted.
    A row belongs to a shard by a hash of its id, so the shards are parts of the same whole for any `count`.

    Args:
        settings: File and columns.
        index: The shard, from 0.
        count: The number of shards.

    Raises:
        UserError: A missing, empty or broken file, a missing column, no usable row in the whole corpus; with
            `on_bad_row=error`, the first row that would be dropped (repetitions are no error).
    """
    reader = _Reader(settings, index, count)
    for where, row in read_rows(find_path(settings.path)):
        if settings.max_rows is not None and reader.num_usable >= settings.max_rows:
            break
        reader.read(where, row)
    if not reader.num_usable:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in sorted(reader.unusable.items()))
        raise UserError(
            f"corpus.path={settings.path}: none of its rows can be used ({reasons}); corpus.response_column="
            f"{settings.response_column} must name the column of the responses"
        )
    return Corpus(reader.examples, reader.num_rows, reader.dropped, reader.dropped_at)


class _Reader:
    """What has been seen so far; see read_corpus."""

    def __init__(self, settings: CorpusSettings, index: int, count: int) -> None:
        self.settings = settings
        self.index = index
        self.count = count
        self.num_usable = 0  # of the whole corpus
        self.unusable: Counter[str] = Counter()  # of the whole corpus
        self.num_rows = 0
        self.examples: list[Example] = []
        self.dropped: Counter[str] = Counter()
        self.dropped_at: dict[str, list[str]] = {}
        self._ids: set[str] = set()
        self._texts: set[str] = set()

    def read(self, where: str, row: dict[str, Any]) -> None:
        """Take one row in, or count why not."""
        settings = self.settings
        needed = [settings.response_column, settings.label_column, settings.id_column]
        if self.num_usable == 0:  # a column that is missing from the first row is missing from the file
            require_columns(row, [name for name in needed if name], where)
        response = row.get(settings.response_column)
        reason = _why_unusable(response)
        id = text_id(response) if isinstance(response, str) else where
        if settings.id_column:
            given = row.get(settings.id_column)
            id = str(given) if given not in (None, "") else where
            reason = reason or ("empty_id" if given in (None, "") else "")
        if reason:
            self._drop_unusable(reason, id, where)
            return
        assert isinstance(response, str)
        self.num_usable += 1
        if not in_shard(id, self.index, self.count):
            return
        self.num_rows += 1
        text = text_id(response)
        if id in self._ids or text in self._texts:
            self._count("duplicate_id" if id in self._ids and settings.id_column else "duplicate_response", where)
            return
        self._ids.add(id)
        self._texts.add(text)
        label = row.get(settings.label_column or "label")
        source = f"{Path(where).name}"  # of the whole path only the name: it may name the user's machine
        self.examples.append(
            Example(id, rejected=response, label="" if label is None else str(label), provenance={"source": source})
        )

    def _drop_unusable(self, reason: str, id: str, where: str) -> None:
        if self.settings.on_bad_row == "error":
            raise UserError(
                f"{where}: {reason} in column {self.settings.response_column}; mend the row, or drop such rows with "
                "corpus.on_bad_row=drop"
            )
        self.unusable[reason] += 1
        if in_shard(id, self.index, self.count):
            self.num_rows += 1
            self._count(reason, where)

    def _count(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        places = self.dropped_at.setdefault(reason, [])
        if len(places) < MAX_PLACES:
            places.append(Path(where).name)


def _why_unusable(response: Any) -> str:
    if response is None or (isinstance(response, str) and not response.strip()):
        return "empty_response"
    if not isinstance(response, str):
        return "response_not_text"
    try:
        response.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can write as \ud800
        return "response_not_unicode"
    return ""
