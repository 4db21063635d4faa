"""The rows of a dataset's files as Examples: one parser for each schema, and every row that cannot be used counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from config.errors import UserError
from config.paths import find_path
from config.settings import DatasetSettings
from safer_instruct.text.examples import Example, is_unicode, text_id
from safer_instruct.text.formats import BadLine, Row
from safer_instruct.text.prompts import ASSISTANT, HUMAN
from safer_instruct.text.readers import read_rows, require_columns
from safer_instruct.text.row_log import RowLog

MAX_ID_CHARACTERS = 32  # a longer id of a file's own is hashed
JUDGEMENTS = {"true": True, "1": True, "good": True, "false": False, "0": False, "bad": False}  # of an answer
FREE_COLUMNS = frozenset({"id", "label", "provenance"})  # no schema needs to read them: they say nothing to a model


class BadRow(Exception):
    """A row that cannot be used; the message is the reason, a key of the counts."""


def _parse_si(row: Row) -> dict[str, Any]:
    return {name: row.get(name) for name in ("instruction", "input", "chosen", "rejected", "label")}


def _parse_alpaca(row: Row) -> dict[str, Any]:
    return {"instruction": row["instruction"], "input": row.get("input"), "chosen": row["output"]}


def _parse_hh(row: Row) -> dict[str, Any]:
    """Split two transcripts that share all but the last answer: the shared part is the prompt, and that is checked."""
    chosen, rejected = row["chosen"], row.get("rejected")
    end = chosen.rfind(ASSISTANT) + len(ASSISTANT) if isinstance(chosen, str) else 0
    if end < len(ASSISTANT) or not chosen.startswith(HUMAN):
        raise BadRow("broken_transcript")
    if rejected is not None and not (isinstance(rejected, str) and rejected.startswith(chosen[:end])):
        raise BadRow("prompts_differ")
    instruction = chosen[len(HUMAN) : end - len(ASSISTANT)]
    return {
        "instruction": instruction,
        "chosen": chosen[end:],
        "rejected": None if rejected is None else rejected[end:],
        "label": row.get("label"),
    }


def _parse_unpaired(row: Row) -> dict[str, Any]:
    """Put an answer where its judgement says: a good one is a chosen response, a bad one a rejected one."""
    judgement = str(row["good"]).strip().casefold()
    if judgement not in JUDGEMENTS:
        raise BadRow("not_judged")
    side = "chosen" if JUDGEMENTS[judgement] else "rejected"
    fields = {name: row.get(name) for name in ("instruction", "input", "label")}
    return {**fields, side: row["response"]}


class Schema(NamedTuple):
    """How the columns of a row become an Example.

    Attributes:
        needed: Columns without which a file cannot be read.
        read: All columns that `parse` looks at.
        parse: From a row to fields of Example; raises BadRow, or KeyError for a field that is missing.
    """

    needed: tuple[str, ...]
    read: tuple[str, ...]
    parse: Callable[[Row], dict[str, Any]]


SCHEMAS = {
    "si": Schema(("instruction", "chosen"), ("instruction", "input", "chosen", "rejected", "label"), _parse_si),
    "alpaca": Schema(("instruction", "output"), ("instruction", "input", "output"), _parse_alpaca),
    "hh": Schema(("chosen",), ("chosen", "rejected", "label"), _parse_hh),
    "unpaired": Schema(
        ("instruction", "response", "good"), ("instruction", "input", "response", "good", "label"), _parse_unpaired
    ),
}


class LoadedExamples:
    """The usable rows of a dataset, streamed; the counts are complete when the iteration is.

    Attributes:
        log: Counts and ids of what was dropped, and why.
    """

    def __init__(
        self, settings: DatasetSettings, path: str, log: RowLog, *, pairs: bool, training: bool = True
    ) -> None:
        if settings.schema not in SCHEMAS:
            raise UserError(f"datasets.{log.name}.schema={settings.schema}: the schemas are {', '.join(SCHEMAS)}")
        self._schema = SCHEMAS[settings.schema]
        self._unpaired = settings.schema == "unpaired"
        if pairs and settings.schema == "alpaca":
            raise UserError(f"datasets=[{log.name}]: schema=alpaca has no rejected responses, and this needs pairs")
        self._needed = [*self._schema.needed, *(["rejected"] if pairs else [])]
        self._needed += ["label"] if settings.labels is not None else []
        self._known = {*self._schema.read, *FREE_COLUMNS}
        self._labels = None if settings.labels is None else set(settings.labels)
        self._path, self._pairs, self._training = find_path(path), pairs, training
        self._renamed = settings.columns
        self.log = log

    @property
    def dropped(self) -> Counter[str]:
        """The rows dropped so far, by reason."""
        return self.log.dropped

    def __iter__(self) -> Iterator[Example]:
        file = None
        rows = read_rows(self._path, columns=self._renamed, training=self._training, bad_line=self._drop_line)
        for where, row in rows:
            if where.rpartition(":")[0] != file:  # the first row of each file
                file = where.rpartition(":")[0]
                require_columns(row, self._needed, file, f"datasets.{self.log.name}.columns")
            self.log.read += 1
            self.log.unread.update(column for column, value in row.items() if value and column not in self._known)
            try:
                example = self._example(row, where)
            except BadRow as bad:
                self.log.drop(str(bad), _row_id(row, text_id(where)), where)
                continue
            reason = self._why_not(example)
            if reason:
                self.log.drop(reason, example.id, where)
            else:
                yield example

    def _drop_line(self, line: BadLine) -> None:
        if self.log.on_bad_row == "error":
            raise line
        self.log.read += 1
        self.log.drop(line.reason, text_id(line.where), line.where)

    def _example(self, row: Row, where: str) -> Example:
        try:
            fields = self._schema.parse(row)
        except KeyError as error:
            raise BadRow("missing_field") from error
        if not isinstance(fields.get("label"), (list, dict, type(None))):
            fields["label"] = str(fields["label"])  # a number, true, a date: files hold labels of any type
        texts = {name: value for name, value in fields.items() if value is not None}
        if not all(isinstance(value, str) for value in texts.values()):
            raise BadRow("not_text")
        stripped = {name: value.strip() for name, value in texts.items()}
        born = text_id(*(stripped.get(name, "") for name in ("instruction", "input", "chosen", "rejected")))
        example = Example(id=_row_id(row, born), provenance={"where": where}, **stripped)
        if stripped != texts:
            self.log.note("stripped", example)
        return example

    def _why_not(self, example: Example) -> str | None:
        """Return the reason to drop the row; None if it is usable."""
        if self._labels is not None and example.label not in self._labels:
            return "other_label"
        needed = ["instruction", *(["chosen", "rejected"] if self._pairs else ["chosen"])]
        if self._unpaired:  # it has one of the two
            needed = ["instruction", "rejected" if example.chosen is None else "chosen"]
        values = {"instruction": example.instruction, "chosen": example.chosen, "rejected": example.rejected}
        for name in needed:
            if not values[name]:
                return f"empty_{name}"
        if self._pairs and example.chosen == example.rejected:
            return "chosen_equals_rejected"
        return None if is_unicode(example.input, *(values[name] or "" for name in needed)) else "broken_unicode"


def _row_id(row: Row, otherwise: str) -> str:
    """Return the row's own id, hashed where it is too long for the store."""
    own = row.get("id")
    if own is None or own == "":
        return otherwise
    name = str(own)
    return name if name.isascii() and name.isprintable() and len(name) <= MAX_ID_CHARACTERS else text_id(name)


def load_examples(settings: DatasetSettings, name: str, *, pairs: bool = False) -> LoadedExamples:
    """Read the rows of a dataset, before the split and before anything is excluded.

    Args:
        settings: Its path, and how its rows are read.
        name: Its name in `datasets=[...]`, for messages.
        pairs: Drop rows without a rejected response, too.

    Returns:
        An iterable of Examples, read anew each time, with the counts of the rows that it dropped.

    Raises:
        UserError: Unknown schema; while iterating: missing columns, unreadable files, bad rows if on_bad_row=error.
    """
    return LoadedExamples(settings, settings.path, RowLog(name, settings.on_bad_row), pairs=pairs)
