"""The corpus of unsafe responses, as Examples whose `rejected` is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.paths import find_path
from config.settings import CorpusSettings
from safer_instruct.text.examples import Example, in_shard, is_unicode
from safer_instruct.text.formats import BadLine, Row
from safer_instruct.text.messages import read_response
from safer_instruct.text.readers import read_rows, require_columns
from safer_instruct.text.row_log import BadRow

MAX_PLACES = 10


@dataclass
class Dropped:
    """Rows dropped from the corpus: how many for each reason, and where the first few are."""

    counts: Counter[str] = field(default_factory=Counter)  # reason -> rows
    places: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few, as "file:line" (never text)

    def count(self, reason: str, where: str) -> None:
        """Count one row."""
        self.counts[reason] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < MAX_PLACES:
            places.append(where)


@dataclass(frozen=True)
class Corpus:
    """The usable rows of one shard, in file order, and the counts of the others."""

    examples: list[Example]  # rows with `id`, `rejected`, `label` and provenance ("corpus.csv:17")
    num_rows: int  # rows of the shard that were read, usable or not
    dropped: Dropped  # rows of the shard that were dropped
    # Why reading stopped before the end of the corpus (file:line and what is wrong there); "" if it did not.
    broken: str = ""


def read_corpus(settings: CorpusSettings, *, index: int = 0, count: int = 1) -> Corpus:
    """Read one shard of the corpus.

    Rows without a response, rows whose response is not text, and repeated ids or responses are dropped and counted.
    A hash of its id assigns a row to a shard, so for any `count` the shards partition the same corpus. If a file turns
    out to be broken after some usable rows, these are kept, and `broken` says what is wrong.

    Raises:
        UserError: A missing, empty or broken file, a missing column, no usable row in the whole corpus; with
            `on_bad_row=error`, the first row that would be dropped (repetitions are no error).
    """
    rows = CorpusRows(settings, index=index, count=count)
    examples: list[Example] = []
    ids: set[str] = set()
    texts: set[str] = set()
    for example in rows:
        text = example.response_id
        if example.id in ids or text in texts:
            rows.dropped.count(repetition(settings, same_id=example.id in ids), example.provenance["source"])
            continue
        ids.add(example.id)
        texts.add(text)
        examples.append(example)
    return Corpus(examples, rows.num_rows, rows.dropped, rows.broken)


def repetition(settings: CorpusSettings, *, same_id: bool) -> str:
    """Return the reason for dropping a row whose id or response has occurred before."""
    return "duplicate_id" if same_id and settings.id_column else "duplicate_response"


class CorpusRows:
    """The usable rows of one shard, streamed, with repetitions; the counts are complete after a full iteration."""

    def __init__(self, settings: CorpusSettings, *, index: int = 0, count: int = 1) -> None:
        self.settings = settings
        self.num_rows = 0  # rows of the shard read so far, usable or not
        self.dropped = Dropped()  # rows of the shard that cannot be used
        self.broken = ""  # see Corpus
        self._index, self._count = index, count
        self._num_usable = 0  # rows of the whole corpus, not of the shard alone
        self._unusable: Counter[str] = Counter()  # of the whole corpus, too

    def __iter__(self) -> Iterator[Example]:
        settings = self.settings
        path = find_path(settings.path)
        rows = read_rows(path, columns=settings.columns, training=True, bad_line=self._drop_line)
        while settings.max_rows is None or self._num_usable < settings.max_rows:
            try:
                where, row = next(rows)
            except StopIteration:
                break
            except UserError as error:
                if not self._num_usable or isinstance(error, BadLine):
                    raise
                self.broken = str(error)
                break
            example = self._example(where, row)
            if example is not None and in_shard(example.id, self._index, self._count):
                self.num_rows += 1
                yield example
        if not self._num_usable:
            reasons = ", ".join(f"{reason}: {number}" for reason, number in sorted(self._unusable.items()))
            raise UserError(
                f"corpus.path={settings.path}: none of its rows can be used ({reasons}); corpus.response_column="
                f"{settings.response_column} must name the column of the responses"
            )

    def _example(self, where: str, row: Row) -> Example | None:
        """Make the Example of a row and count it; return None if it cannot be used."""
        settings = self.settings
        needed = [settings.response_column, settings.label_column, settings.id_column]
        if self._num_usable == 0:  # a column that is missing from the first row is missing from the file
            require_columns(row, [name for name in needed if name], where, "corpus.columns", settings.columns)
        label = _text(row.get(settings.label_column or "label"))
        source = Path(where).name  # not the whole path, which may reveal the user's machine
        try:
            response, system, history = read_response(row.get(settings.response_column), settings.response_column)
        except BadRow as bad:
            self._drop(bad.reason, where, where)
            return None
        example = Example("", rejected=response, label=label, provenance={"source": source}, history=history)
        reason = _why_unusable(response) or ("" if is_unicode(system, *chain(*history)) else "history_not_unicode")
        id = example.response_id if isinstance(response, str) else where
        if settings.id_column:
            given = _text(row.get(settings.id_column))
            id = given or where
            reason = reason or ("" if given else "empty_id")
        if not reason and not is_unicode(id, label):
            reason = "label_or_id_not_unicode"
        if reason:
            self._drop(reason, id, where)
            return None
        self._num_usable += 1
        return replace(example, id=id, system=system)

    def _drop_line(self, line: BadLine) -> None:
        if self.settings.on_bad_row == "error":
            raise line
        self._drop(line.reason, line.where, line.where)

    def _drop(self, reason: str, id: str, where: str) -> None:
        if self.settings.on_bad_row == "error":
            raise UserError(
                f"{where}: {reason} in column {self.settings.response_column}; fix the row, or drop such rows with "
                "corpus.on_bad_row=drop"
            )
        self._unusable[reason] += 1
        if in_shard(id, self._index, self._count):
            self.num_rows += 1
            self.dropped.count(reason, Path(where).name)


def _why_unusable(response: Any) -> str:
    if response is None or (isinstance(response, str) and not response.strip()):
        return "empty_response"
    if not isinstance(response, str):
        return "response_not_text"
    return "" if is_unicode(response) else "response_not_unicode"


def _text(value: Any) -> str:
    return "" if value is None else str(value)
