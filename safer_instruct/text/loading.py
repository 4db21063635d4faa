"""The rows of a dataset as Examples, parsed by the dataset's schema; every unusable row is counted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any, cast

from config.errors import UserError
from config.paths import find_path
from config.settings import DatasetSettings
from safer_instruct.text.examples import Example, Message, is_unicode, text_id
from safer_instruct.text.formats import BadLine, Row
from safer_instruct.text.hub import hub_dataset
from safer_instruct.text.messages import is_messages
from safer_instruct.text.pairs import Pairing, best, make_pairs
from safer_instruct.text.prompts import HUMAN
from safer_instruct.text.readers import likely, read_rows, require_columns, usable_rows
from safer_instruct.text.row_log import BadRow, RowLog
from safer_instruct.text.schemas import SCHEMAS
from safer_instruct.text.standard import Fields, parse_standard

MAX_ID_CHARACTERS = 32  # a longer id of a file's own is hashed
# What programs write for a cell without a value. It may be an answer, too ("null"), so it is noted and not dropped.
MISSING_WORDS = frozenset({"nan", "none", "null", "na", "n/a", "<na>", "nil"})
MAX_MISSING = max(map(len, MISSING_WORDS))
FREE_COLUMNS = frozenset({"id", "label", "provenance"})  # no schema needs to read them: they say nothing to a model


class LoadedExamples:
    """The usable rows of a dataset, streamed; the counts are complete after a full iteration."""

    def __init__(
        self,
        settings: DatasetSettings,
        path: str,
        log: RowLog,
        *,
        pairs: bool,
        training: bool = True,
        single: bool = False,
    ) -> None:
        if settings.schema not in SCHEMAS:
            raise UserError(f"datasets.{log.name}.schema={settings.schema}: the schemas are {', '.join(SCHEMAS)}")
        self._schema = schema = SCHEMAS[settings.schema]
        if pairs and schema.for_pairs is None:
            raise UserError(
                f"datasets=[{log.name}]: schema={settings.schema} has no rejected responses, and this needs pairs"
            )
        self._needed = [*schema.needed, *((schema.for_pairs or ()) if pairs else ())]
        self._needed += ["label"] if settings.labels is not None else []
        self._known = None if schema.read is None else {*schema.read, *FREE_COLUMNS}
        self._labels = None if settings.labels is None else set(settings.labels)
        self._path, self._pairs, self._training = find_path(path), pairs, training
        self._single = single or settings.schema == "unpaired"
        judged = single and settings.schema == "custom"
        self._parse = partial(parse_standard, judged=True) if judged else schema.parse
        self._settings = settings
        self._hub = hub_dataset(log.name, settings) if path == settings.path else None
        self.log = log  # counts and ids of what was dropped, and why

    def __iter__(self) -> Iterator[Example]:
        for fields, id, where in self._prompts():
            try:
                found = self._with_answers(fields)
            except BadRow as bad:
                self._drop(bad, id or text_id(where), where)
                continue
            for number, one in enumerate(found):
                yield from self._example(one, _numbered(id, number), where)

    def _prompts(self) -> Iterator[tuple[Fields, str, str]]:
        """Yield (fields, the row's own id, where) of each prompt: one row, or several that answer the same prompt."""
        if not self._schema.joined:
            yield from self._rows()
            return
        for _, rows in groupby(self._rows(), lambda one: [one[0].get(name) for name in ("history", "instruction")]):
            first, *others = rows
            if "answers" not in first[0]:  # each row is a comparison on its own
                yield from (first, *others)
                continue
            answers = [answer for fields, _, _ in (first, *others) for answer in fields["answers"]]
            yield {**first[0], "answers": answers}, *first[1:]

    def _rows(self) -> Iterator[tuple[Fields, str, str]]:
        file, columns = None, self._settings.columns
        parsed = False  # whether any row of the current file has been parsed
        if self._hub is None:
            rows = read_rows(self._path, columns=columns, training=self._training, bad_line=self._drop_line)
        else:
            rows = usable_rows(self._hub.rows(), columns, self._drop_line)
        for where, row in rows:
            if where.rpartition(":")[0] != file:  # the first row of each file
                file, parsed = where.rpartition(":")[0], False
                self._require_columns(row, file)
            self.log.read += 1
            if self._known is not None:
                self.log.unread.update(column for column, value in row.items() if value and column not in self._known)
            try:
                fields = self._parse(row)
            except KeyError as error:
                self._drop(BadRow("missing_field", str(error.args[0])), _row_id(row) or text_id(where), where)
            except BadRow as bad:
                if bad.reason == "not_judged" and not parsed:  # probably the wrong column: every row would fail
                    raise UserError(
                        f"{where}: column {bad.column} does not say whether the answer is good, which is needed here: "
                        f"expected {bad.expected}; datasets.{self.log.name}.columns.{bad.column}=NAME reads another"
                    ) from None
                self._drop(bad, _row_id(row) or text_id(where), where)
            else:
                parsed = True
                yield fields, _row_id(row), where

    def _require_columns(self, row: Row, file: str) -> None:
        schema, choice, needed = self._settings.schema, self._schema.one_of, list(self._needed)
        if choice and not any(name in row for name in choice):
            file += f": one of {', '.join(choice)} is needed"
            needed.append(next((name for name in choice if likely(name, row)), choice[0]))
        talks = [name for name, cell in row.items() if _is_conversation(cell)]
        is_read = schema == "custom" or (schema == "sharegpt" and likely(needed[0] if needed else "messages", row))
        if talks and not is_read and not all(name in row for name in needed):
            other = "sharegpt" if talks[0] in SCHEMAS["sharegpt"].one_of else "custom"
            is_named = other == "sharegpt" or len(talks) > 1 or talks[0] in (SCHEMAS["custom"].read or ())
            renamed = "" if is_named else f" datasets.custom.columns.messages={talks[0]}"
            raise UserError(
                f"{file}: the column {talks[0]} holds conversations, which schema={schema} does not read: "
                f"write datasets=[{other}] datasets.{other}.path={self._settings.path}{renamed}"
            )
        if schema == "custom" and not talks and not str(row.get("chosen")).startswith(HUMAN):
            # Without its name, a prompt would be looked for in what the answers begin with.
            needed += [name for name in ("prompt", *(["scores"] * ("responses" in needed))) if likely(name, row)]
        require_columns(row, needed, file, f"datasets.{self.log.name}.columns", self._settings.columns)

    def _with_answers(self, fields: Fields) -> list[Fields]:
        """Return the fields of each example; several answers make one example per pair, or one with the best answer."""
        answers, margin = fields.pop("answers", None), fields.pop("margin", None)
        if not fields.pop("is_safe", True) and not self._pairs:  # the better one of two, and no answer to learn
            raise BadRow("unsafe_chosen")
        if answers is None:
            if self._pairs and margin is not None and margin < self._settings.min_margin:
                raise BadRow("small_margin")
            return [fields]
        if not self._pairs:
            return [{**fields, "chosen": best(answers)}]
        pairs = make_pairs(answers, cast(Pairing, self._settings.pairing), self._settings.min_margin)
        return [{**fields, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]

    def _drop(self, bad: BadRow, id: str, where: str) -> None:
        self.log.drop(bad.reason, id, where, column=bad.column, expected=bad.expected)

    def _drop_line(self, line: BadLine) -> None:
        if self.log.on_bad_row == "error":
            raise line
        self.log.read += 1
        self.log.why.setdefault(line.reason, str(line))
        self.log.drop(line.reason, text_id(line.where), line.where)

    def _example(self, fields: Fields, id: str, where: str) -> Iterator[Example]:
        """Yield the example made from these fields, if it is usable."""
        history: tuple[Message, ...] = fields.pop("history", ())
        if not isinstance(fields.get("label"), (list, dict, type(None))):
            fields["label"] = str(fields["label"])  # labels may be numbers, booleans or dates
        texts = {name: value for name, value in fields.items() if value is not None}
        wrong = next((name for name, value in texts.items() if not isinstance(value, str) or is_messages(value)), None)
        if wrong is not None:
            other = ", or datasets=[custom], which reads messages," if _is_conversation(texts[wrong]) else ""
            self._drop(BadRow("not_text", wrong, f"a text{other}"), id or text_id(where), where)
            return
        stripped = {name: value.strip() for name, value in texts.items()}
        turns = tuple(Message(role, content.strip()) for role, content in history)
        born = [stripped.get(name, "") for name in ("instruction", "input", "chosen", "rejected")]
        born += [text for turn in turns for text in turn]
        example = Example(id=id or text_id(*born), provenance={"where": where}, history=turns, **stripped)
        if stripped != texts or turns != history:
            self.log.note("stripped", example)
        if any(len(text) <= MAX_MISSING and text.casefold() in MISSING_WORDS for text in born):
            self.log.note("a_text_is_a_word_for_a_missing_value", example)
        reason = self._why_not(example)
        if reason:
            self.log.drop(reason, example.id, where)
        else:
            yield example

    def _why_not(self, example: Example) -> str | None:
        """Return the reason to drop the row; None if it is usable."""
        if self._labels is not None and example.label not in self._labels:
            return "other_label"
        needed = ["instruction", *(["chosen", "rejected"] if self._pairs else ["chosen"])]
        if self._single and example.chosen is None:  # a single answer is either chosen or rejected
            needed = ["instruction", "rejected"]
        values = {"instruction": example.instruction, "chosen": example.chosen, "rejected": example.rejected}
        for name in needed:
            if not values[name]:
                return f"empty_{name}"
        if self._pairs and example.chosen == example.rejected:
            return "chosen_equals_rejected"
        if any(not turn.content for turn in example.history):
            return "empty_turn"
        texts = [example.input, example.system, *(turn.content for turn in example.history)]
        return None if is_unicode(*texts, *(values[name] or "" for name in needed)) else "broken_unicode"


def _is_conversation(cell: Any) -> bool:
    if isinstance(cell, str):
        return is_messages(cell)
    first = cell[0] if isinstance(cell, list) and cell else None
    return isinstance(first, dict) and not {"role", "from"}.isdisjoint(first)


def _numbered(id: str, number: int) -> str:
    """Return the id of one of several examples from a row; "" if the row has no id of its own."""
    return _short(f"{id}-{number}") if id and number else id


def _row_id(row: Row) -> str:
    """Return the row's own id, hashed if it does not fit into the store; "" if it has none."""
    own = row.get("id")
    return "" if own is None else _short(str(own))


def _short(name: str) -> str:
    return name if name.isascii() and name.isprintable() and len(name) <= MAX_ID_CHARACTERS else text_id(name)


def load_examples(settings: DatasetSettings, name: str, *, pairs: bool = False) -> LoadedExamples:
    """Read the rows of a dataset, before splitting and before exclusions.

    With `pairs`, rows without a rejected response are also dropped.

    Returns:
        An iterable of Examples that rereads the files on each iteration and counts the rows it drops.

    Raises:
        UserError: Unknown schema; while iterating: missing columns, unreadable files, bad rows if on_bad_row=error.
    """
    return LoadedExamples(settings, settings.path, RowLog(name, settings.on_bad_row), pairs=pairs)
