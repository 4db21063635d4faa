"""Count what happens to the rows of a dataset, and report it in a few lines that never quote a text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from config.errors import UserError
from safer_instruct.text.display import visible
from safer_instruct.text.examples import Example

IDS_IN_REPORT = 100  # ids listed for each kind; rows.jsonl beside the stores has them all
SKIPS = frozenset({"excluded", "other_label", "in_eval_file"})  # intended, so no error with on_bad_row=error
FILES_SHOWN = 10
MIN_ANSWERED = 0.1  # share of the prompts; less is as good as none, and close to the error of the detector


class BadRow(Exception):
    """A row that cannot be used.

    Attributes:
        reason: The name under which it is counted.
        column: The column at fault, "" for the row as a whole.
        expected: What the column should hold, "" if the reason already says so.
    """

    def __init__(self, reason: str, column: str = "", expected: str = "") -> None:
        super().__init__(reason)
        self.reason, self.column, self.expected = reason, column, expected


@dataclass
class RowLog:
    """Counts of what happened to the rows of one dataset."""

    name: str
    on_bad_row: str = "drop"
    read: int = 0  # rows read
    # Rows by what happened to them: train, eval, a kind of cut or note, ... (see `dropped` for the others)
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    why: dict[str, str] = field(default_factory=dict)  # reason to drop -> location and fault of the first such row
    ids: dict[str, list[str]] = field(default_factory=dict)  # the first ids of each kind
    # Column that the schema does not read -> number of rows in which it is not empty.
    unread: Counter[str] = field(default_factory=Counter)
    events: TextIO | None = None

    def note(self, kind: str, example: Example) -> None:
        """Count a property of a row that is kept."""
        self.counts[kind] += 1
        self._remember(kind, example.id, str(example.provenance["where"]))

    def drop(self, reason: str, id: str, where: str, *, column: str = "", expected: str = "") -> None:
        """Count a row that is dropped; with on_bad_row=error, raise a UserError for a bad row instead."""
        place = f" in column {column}" if column else ""
        wanted = f" ({expected} is expected)" if expected else ""
        self.why.setdefault(reason, f"{where}: {reason.replace('_', ' ')}{place}{wanted}")
        if self.on_bad_row == "error" and reason not in SKIPS:
            raise UserError(
                f"{where}: bad row {id}: {reason.replace('_', ' ')}{place}{wanted}; fix the row, or drop and count "
                f"such rows with datasets.{self.name}.on_bad_row=drop"
            )
        self.dropped[reason] += 1
        self._remember(reason, id, where, column=column, expected=expected)

    def drop_example(self, reason: str, example: Example, why: str = "") -> None:
        """Count a readable row that is dropped."""
        where = str(example.provenance["where"])
        if why:
            self.why.setdefault(reason, f"{where}: {why}")
        self.drop(reason, example.id, where)

    def _remember(self, kind: str, id: str, where: str, **details: str) -> None:
        ids = self.ids.setdefault(kind, [])
        if len(ids) < IDS_IN_REPORT:
            ids.append(id)
        if self.events is not None:
            record = {"dataset": self.name, "id": id, "where": where, "what": kind}
            record |= {name: detail for name, detail in details.items() if detail}
            self.events.write(json.dumps(record) + "\n")


def describe(report: Mapping[str, Any]) -> str:
    """Render a short summary for the console: files, rows used, drops by reason, cuts by kind. Counts only."""
    lines = []
    for name, counts in report["datasets"].items():
        lines.append(f"{name}: {counts['read']} rows read, {counts['train']} train, {counts['eval']} eval")
        if "mixture" in report:
            lines.append(f"  trained on, by the weights of the datasets: {report['mixture'][name]} rows")
        lines += _describe_files(name, report.get("files", {}).get(name, {}))
        for what, numbers in (("dropped", counts["dropped"]), ("noted", counts["noted"])):
            if numbers:
                parts = [f"{kind.replace('_', ' ')} {number}" for kind, number in sorted(numbers.items())]
                lines.append(f"  {what}: {', '.join(parts)}")
        if counts["unread_columns"]:
            parts = [
                f"{visible(column)} ({number} rows)" for column, number in sorted(counts["unread_columns"].items())
            ]
            lines.append(f"  note: columns that the schema does not read: {', '.join(parts)}")
        if counts["dropped"].get("excluded"):
            lines.append(f"  excluded: instructions of {counts['excluded_by']} are not trained on")
        used = counts["train"] + counts["eval"]
        if counts["most_common_target"] > 0.1 * used and counts["most_common_target"] > 1:
            share = counts["most_common_target"] / used
            lines.append(f"  note: {share:.1%} of the rows used have the same target text")
    lines += [note if note.startswith("WARNING") else f"note: {note}" for note in report.get("notes", ())]
    return "\n".join(lines)


def _describe_files(name: str, files: Mapping[str, list[str]]) -> list[str]:
    read, left_out, others = (
        [visible(file) for file in files.get(what, ())] for what in ("read", "left_out", "others")
    )
    more = f" and {len(read) - FILES_SHOWN} more" if len(read) > FILES_SHOWN else ""
    lines = [f"  files: {', '.join(read[:FILES_SHOWN])}{more}"] if read else []
    if left_out:
        named = ", ".join(left_out[:FILES_SHOWN])
        lines.append(f"  not read because of their names: {named}; datasets.{name}.eval_path=FILE evaluates on one")
    if others:
        lines.append(f"  not read, no data files by their endings: {', '.join(others[:FILES_SHOWN])}")
    return lines


def few_answered(report: Mapping[str, Any]) -> list[str]:
    """Return a warning if nearly every prompt is to be declined: a model then learns to decline everything."""
    counts = report["datasets"].values()
    rows, answered = sum(one["train"] + one["eval"] for one in counts), sum(one["answered"] for one in counts)
    if answered >= MIN_ANSWERED * rows:
        return []
    return [
        f"WARNING: {answered} of {rows} prompts ({answered / rows:.1%}) are to be answered, the others to be "
        "declined; a model trained on such data also declines harmless prompts. Add pairs that answer: induce.py "
        "stage=replay and stage=contrast, then datasets=[si,replay,contrast]"
    ]


def count_cut(report: Mapping[str, Any]) -> dict[str, int]:
    """Return how many prompts and responses were cut, over all datasets in a report."""
    noted = Counter[str]()
    for counts in report["datasets"].values():
        noted.update(counts["noted"])
    responses = noted["response_cut"] + noted["chosen_cut"] + noted["rejected_cut"]
    return {"prompts": noted["prompt_cut"], "responses": responses}
