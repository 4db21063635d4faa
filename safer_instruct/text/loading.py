"""The rows of a dataset's files as Examples: one parser a schema, with every row that cannot be used counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from config.errors import UserError
from config.paths import find_path
from config.settings import DatasetSettings
from safer_instruct.text.examples import Example, text_id
from safer_instruct.text.prompts import ASSISTANT, HUMAN
from safer_instruct.text.readers import Row, read_rows, require_columns

MAX_ID_CHARACTERS = 32  # a longer id of a file's own is hashed
IDS_IN_REPORT = 100  # of each kind; rows.jsonl beside the stores has them all
SKIPS = frozenset({"excluded", "other_label", "in_eval_file"})  # wanted, so no error where on_bad_row=error


class BadRow(Exception):
    """A row that cannot be used; the message is the reason, a key of the counts."""


@dataclass
class RowLog:
    """What became of the rows of one dataset.

    Attributes:
        read: Rows read.
        counts: Rows by what happened to them: train, eval, a reason to drop or to skip, a kind of cut, ...
        ids: The first ids of each kind.
    """

    name: str
    on_bad_row: str = "drop"
    read: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    ids: dict[str, list[str]] = field(default_factory=dict)
    events: TextIO | None = None

    def note(self, kind: str, example: Example) -> None:
        """Count something about a row that stays."""
        self.counts[kind] += 1
        self._remember(kind, example.id, str(example.provenance["where"]))

    def drop(self, reason: str, id: str, where: str) -> None:
        """Count a row that goes; raises a UserError instead where on_bad_row=error and the row is bad."""
        if self.on_bad_row == "error" and reason not in SKIPS:
            raise UserError(
                f"{where}: bad row {id}: {reason.replace('_', ' ')}; mend the row, or drop and count such rows with "
                f"datasets.{self.name}.on_bad_row=drop"
            )
        self.dropped[reason] += 1
        self._remember(reason, id, where)

    def _remember(self, kind: str, id: str, where: str) -> None:
        ids = self.ids.setdefault(kind, [])
        if len(ids) < IDS_IN_REPORT:
            ids.append(id)
        if self.events is not None:
            record = {"dataset": self.name, "id": id, "where": where, "what": kind}
            self.events.write(json.dumps(record) + "\n")


def _parse_si(row: Row) -> dict[str, Any]:
    return {name: row.get(name) for name in ("instruction", "input", "chosen", "rejected", "label")}


def _parse_alpaca(row: Row) -> dict[str, Any]:
    return {"instruction": row["instruction"], "input": row.get("input"), "chosen": row["output"]}


def _parse_hh(row: Row) -> dict[str, Any]:
    """Two transcripts that share all but the last answer: the shared part is the prompt, and that is checked."""
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


SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[Row], dict[str, Any]]]] = {
    "si": (("instruction", "chosen"), _parse_si),
    "alpaca": (("instruction", "output"), _parse_alpaca),
    "hh": (("chosen",), _parse_hh),
}


class LoadedExamples:
    """The usable rows of a dataset, streamed; the counts are complete when the iteration is.

    Attributes:
        log: Counts and ids of what was dropped, and why.
    """

    def __init__(self, settings: DatasetSettings, path: str, log: RowLog, *, pairs: bool) -> None:
        if settings.schema not in SCHEMAS:
            raise UserError(f"datasets.{log.name}.schema={settings.schema}: the schemas are {', '.join(SCHEMAS)}")
        columns, self._parse = SCHEMAS[settings.schema]
        if pairs and settings.schema == "alpaca":
            raise UserError(f"datasets=[{log.name}]: schema=alpaca has no rejected responses; dpo and ipo need pairs")
        self._columns = (*columns, "rejected") if pairs else columns
        self._columns += ("label",) if settings.labels is not None else ()
        self._labels = None if settings.labels is None else set(settings.labels)
        self._path, self._pairs = find_path(path), pairs
        self.log = log

    @property
    def dropped(self) -> Counter[str]:
        """Rows dropped so far, by reason."""
        return self.log.dropped

    def __iter__(self) -> Iterator[Example]:
        file = None
        for where, row in read_rows(self._path):
            if where.rpartition(":")[0] != file:  # the first row of each file
                file = where.rpartition(":")[0]
                require_columns(row, self._columns, file)
            self.log.read += 1
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

    def _example(self, row: Row, where: str) -> Example:
        try:
            fields = self._parse(row)
        except KeyError as error:
            raise BadRow("missing_field") from error
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
        """The reason to drop the row; None if it is usable."""
        if self._labels is not None and example.label not in self._labels:
            return "other_label"
        needed = ("instruction", "chosen", "rejected") if self._pairs else ("instruction", "chosen")
        values = {"instruction": example.instruction, "chosen": example.chosen, "rejected": example.rejected}
        for name in needed:
            if not values[name]:
                return f"empty_{name}"
        if self._pairs and example.chosen == example.rejected:
            return "chosen_equals_rejected"
        try:
            "".join([example.input, *(values[name] or "" for name in needed)]).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as JSON's escapes can produce: no tokenizer takes it
            return "broken_unicode"
        return None


def _row_id(row: Row, otherwise: str) -> str:
    """The row's own id, hashed where it is too long for the store."""
    own = row.get("id")
    if own is None or own == "":
        return otherwise
    name = str(own)
    return name if name.isascii() and name.isprintable() and len(name) <= MAX_ID_CHARACTERS else text_id(name)


def load_examples(settings: DatasetSettings, name: str, *, pairs: bool = False) -> LoadedExamples:
    """The rows of a dataset, before the split and before anything is excluded.

    Args:
        settings: Where it lies and how its rows read.
        name: Its name in `datasets=[...]`, for messages.
        pairs: Drop rows without a rejected response, too.

    Returns:
        An iterable of Examples, read anew each time, with the counts of the rows that it dropped.

    Raises:
        UserError: Unknown schema; while iterating: missing columns, unreadable files, bad rows if on_bad_row=error.
    """
    return LoadedExamples(settings, settings.path, RowLog(name, settings.on_bad_row), pairs=pairs)
