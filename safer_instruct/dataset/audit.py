"""A look over any dataset in the schema of `si`: what is empty, repeated, collapsed, or taken from a test set.

Rows are streamed, repetitions are found on the disk (`spool.Spool`): of each row one byte is kept. The report has
counts, hashes and lengths, never text.
"""

from __future__ import annotations

import heapq
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from config.paths import find_path
from config.settings import DuplicatesSettings
from safer_instruct.dataset.files import write_dataset
from safer_instruct.dataset.similarity import LeakageGuard, NearDuplicates
from safer_instruct.dataset.spool import Spool
from safer_instruct.report.dataset_plots import plot_parts
from safer_instruct.text.display import visible
from safer_instruct.text.examples import normalise, text_id
from safer_instruct.text.readers import read_rows, require_columns

TEXT_COLUMNS = ("instruction", "rejected", "chosen")
NUM_BUCKETS = 64
TOP_CHOSEN = 10
UNLABELLED = "(none)"
# What is found about a row, by its bit; the first that applies is why the cleaned dataset is without it.
FINDINGS = {"leak": 1, "near_leak": 2, "duplicate_pair": 4, "near_duplicate_pair": 8, "repeated_chosen": 16}


def audit(
    path: str,
    *,
    guard: LeakageGuard,
    duplicates: DuplicatesSettings,
    max_same_chosen: int | None,
    output: Path | None,
    format: str = "all",
) -> dict[str, Any]:
    """Count what is wrong with a dataset, and write one without it if there is an `output`.

    Args:
        path: File or folder with columns instruction and chosen, and perhaps rejected, label, id, provenance.
        guard: Instructions of a test set.
        duplicates: Which pairs are nearly repeated.
        max_same_chosen: Of rows with one safe response so many stay; None: all.
        output: Folder of the cleaned dataset, None for none.
        format: Of the cleaned dataset.

    Returns:
        The report as JSON values.
    """
    with tempfile.TemporaryDirectory(dir=output if output and output.is_dir() else None, prefix=".audit") as name:
        job = _Audit(path, guard, Path(name))
        job.read(None if duplicates.threshold is None else _near(duplicates, Path(name)))
        job.find_repetitions(max_same_chosen)
        report = job.report()
        if output is not None:
            num_rows = write_dataset(output, format, job.clean_rows())
            report["cleaned"] = {"rows": num_rows, "dropped": dict(sorted(job.cleaned.items()))}
    return report


def _near(duplicates: DuplicatesSettings, folder: Path) -> NearDuplicates:
    assert duplicates.threshold is not None
    index = folder / "index" if duplicates.index == "disk" else None
    if index is not None:
        index.mkdir()
    return NearDuplicates(duplicates.threshold, index)


class _Audit:
    def __init__(self, path: str, guard: LeakageGuard, folder: Path) -> None:
        self.cleaned: Counter[str] = Counter()
        self._path = path
        self._guard = guard
        self._marks = bytearray()
        self._labels: list[str] = []  # distinct
        self._label_numbers: dict[str, int] = {}
        self._label_of_row = bytearray()  # number of the label, those beyond 255 together
        self._empty: Counter[tuple[int, str]] = Counter()
        self._words: dict[str, Counter[int]] = {column: Counter() for column in TEXT_COLUMNS}
        self._found_in_test: set[str] = set()
        self._spools = {name: Spool(folder, name, NUM_BUCKETS) for name in ("pair", "instruction", "chosen")}
        self._chosen: dict[str, Any] = {}
        self._instructions: dict[str, int] = {}

    def _rows(self) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
        """Yield (place, row, its texts), empty ones as ""."""
        for n, (where, row) in enumerate(read_rows(find_path(self._path))):
            if n == 0:
                require_columns(row, ["instruction", "chosen"], where)
            yield where, row, {column: str(row.get(column) or "").strip() for column in TEXT_COLUMNS}

    def read(self, near: NearDuplicates | None) -> None:
        """Go through the dataset once."""
        for n, (_, row, texts) in enumerate(self._rows()):
            label = self._number_of(str(row.get("label") or "") or UNLABELLED)
            self._label_of_row.append(label)
            self._marks.append(0)
            for column, text in texts.items():
                self._words[column][len(text.split())] += 1
                self._empty[label, column] += not text
            instruction = normalise(texts["instruction"])
            reason = self._guard.reason(instruction)
            if reason:
                self._marks[n] |= FINDINGS["leak" if reason == "excluded_instruction" else "near_leak"]
            if instruction in self._guard.exact:
                self._found_in_test.add(instruction)
            keys = {
                "pair": text_id(*(normalise(texts[column]) for column in TEXT_COLUMNS)),
                "instruction": text_id(instruction),
                "chosen": text_id(normalise(texts["chosen"])),
            }
            for name, key in keys.items():
                self._spools[name].add(key, f"{key} {n} {len(texts['chosen'])}\n".encode())
            if near is not None:
                near.add("\n".join(texts[column] for column in ("instruction", "rejected")))
        for n, is_near in enumerate(near.duplicates() if near is not None else ()):
            self._marks[n] |= FINDINGS["near_duplicate_pair"] * bool(is_near)

    def _number_of(self, label: str) -> int:
        if label not in self._label_numbers:
            self._label_numbers[label] = min(len(self._labels), 255)
            if len(self._labels) < 256:
                self._labels.append(label if len(self._labels) < 255 else "(others)")
        return self._label_numbers[label]

    def find_repetitions(self, max_same_chosen: int | None) -> None:
        """Mark repeated pairs and the safe responses beyond the cap, and find the most frequent of these."""
        for key_rows in self._groups("pair"):
            for n, _ in key_rows[1:]:
                self._marks[n] |= FINDINGS["duplicate_pair"]
                self._marks[n] &= ~FINDINGS["near_duplicate_pair"]
        sizes = Counter(min(len(key_rows), 2) for key_rows in self._groups("instruction"))
        self._instructions = {"distinct": sizes.total(), "with_several_rows": sizes[2]}
        top: list[tuple[int, int]] = []
        distinct = 0
        for key_rows in self._groups("chosen"):
            distinct += 1
            if key_rows[0][1]:  # an empty cell is no response
                heapq.heappush(top, (len(key_rows), key_rows[0][1]))
                if len(top) > TOP_CHOSEN:
                    heapq.heappop(top)
                for n, _ in key_rows[max_same_chosen:] if max_same_chosen is not None else ():
                    self._marks[n] |= FINDINGS["repeated_chosen"]
        most = [{"rows": rows, "characters": length} for rows, length in sorted(top, reverse=True)]
        self._chosen = {"distinct": distinct, "most_frequent": most}

    def _groups(self, name: str) -> Iterator[list[tuple[int, int]]]:
        """Yield (row number, characters of its `chosen`) of all rows with one key, ascending."""
        for bucket in range(NUM_BUCKETS):
            groups: dict[bytes, list[tuple[int, int]]] = {}
            for line in self._spools[name].read(bucket):
                key, n, length = line.split()
                groups.setdefault(key, []).append((int(n), int(length)))
            yield from groups.values()

    def report(self) -> dict[str, Any]:
        """The counts; see audit."""
        num_rows = len(self._marks)
        pairs: Counter[tuple[int, int]] = Counter(zip(self._label_of_row, self._marks, strict=True))
        by_label = {}
        for number, label in enumerate(self._labels):
            of_label = {mark: rows for (of, mark), rows in pairs.items() if of == number}
            found = {name: sum(n for mark, n in of_label.items() if mark & bit) for name, bit in FINDINGS.items()}
            empty = {f"empty_{column}": self._empty[number, column] for column in TEXT_COLUMNS}
            by_label[label] = {"rows": sum(of_label.values()), **empty, **found}
        total = {key: sum(counts[key] for counts in by_label.values()) for key in next(iter(by_label.values()))}
        return {
            "path": Path(self._path).name,
            "rows": num_rows,
            "total": total,
            "by_label": by_label,
            "chosen": self._chosen,
            "instructions": self._instructions,
            "test_set": {"instructions": len(self._guard.exact), "found_in_dataset": len(self._found_in_test)},
            "words": {column: _quantiles(counts) for column, counts in self._words.items()},
        }

    def clean_rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows in which nothing was found that must go, and count the others."""
        for (where, row, texts), mark in zip(self._rows(), self._marks, strict=True):
            reason = next((name for name, bit in FINDINGS.items() if mark & bit), None)
            if reason:
                self.cleaned[reason] += 1
                continue
            provenance = row.get("provenance") or {"source": Path(where).name}
            yield {
                "id": str(row.get("id") or text_id(*texts.values())),
                **texts,
                "label": str(row.get("label") or ""),
                "provenance": json.loads(provenance) if isinstance(provenance, str) else provenance,
            }


def _quantiles(counts: Mapping[int, int]) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum of the words of the cells that are not empty."""
    known = sorted((words, rows) for words, rows in counts.items() if words)
    total = sum(rows for _, rows in known)
    if not total:
        return {"mean": 0.0, "median": 0, "p95": 0, "max": 0}

    def at(share: float) -> int:
        passed = 0
        for words, rows in known:
            passed += rows
            if passed >= share * total:
                return words
        return known[-1][0]

    mean = sum(words * rows for words, rows in known) / total
    return {"mean": round(mean, 1), "median": at(0.5), "p95": at(0.95), "max": known[-1][0]}


def render_audit(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    names = list(report["total"])
    heads = [name.replace("_", " ") for name in names]
    lines = [f"| label | {' | '.join(heads)} |", "|---" * (len(names) + 1) + "|"]
    for label, counts in [*report["by_label"].items(), ("**all**", report["total"])]:
        cell = visible(label).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {cell} | {' | '.join(str(counts[name]) for name in names)} |")
    rows = max(1, report["rows"])
    chosen, test = report["chosen"], report["test_set"]
    most = ", ".join(
        f"{one['rows']} rows ({100 * one['rows'] / rows:.1f}%) one text of {one['characters']} characters"
        for one in chosen["most_frequent"][:3]
        if one["rows"] > 1
    )
    lines += ["", f"Safe responses: {chosen['distinct']} distinct" + (f"; {most}" if most else "") + "."]
    lines.append(
        f"Instructions: {report['instructions']['distinct']} distinct, "
        f"{report['instructions']['with_several_rows']} with more than one row."
    )
    if test["instructions"]:
        lines.append(
            f"Test set: {test['found_in_dataset']} of its {test['instructions']} instructions are in the data."
        )
    lines += ["", "| words | mean | median | 95% | most |", "|---|---|---|---|---|"]
    for column, values in report["words"].items():
        lines.append(f"| {column} | {values['mean']} | {values['median']} | {values['p95']} | {values['max']} |")
    if "cleaned" in report:
        drops = ", ".join(f"{reason} {n}" for reason, n in report["cleaned"]["dropped"].items()) or "nothing"
        lines += ["", f"Written without them: {report['cleaned']['rows']} rows (dropped: {drops})."]
    return "\n".join(lines)


def write_audit(report: Mapping[str, Any], output: Path) -> None:
    """Write audit.json, audit.md and its figures, each as a whole or not at all."""
    kinds = (("fine", "nothing found", "#0072B2"), ("found", "something found", "#E69F00"))
    bars = {}
    for label, counts in report["by_label"].items():
        found = min(counts["rows"], sum(counts[name] for name in FINDINGS))
        bars[label] = [counts["rows"] - found, found]
    labels = plot_parts(bars, [(words, color) for _, words, color in kinds], "rows")
    most = {
        f"{one['characters']} characters (no. {number})": [one["rows"], report["rows"] - one["rows"]]
        for number, one in enumerate(report["chosen"]["most_frequent"], start=1)
    }
    chosen = plot_parts(most, [("rows with this response", "#D55E00"), ("other rows", "#D9DDE3")], "rows")
    page = f"# Audit of {visible(report['path'])}\n\n{render_audit(report)}\n\n"
    page += "![Rows of each label](audit_labels.svg)\n\n![The most frequent safe responses](audit_chosen.svg)\n"
    files = {"audit.json": json.dumps(report, indent=2, ensure_ascii=False) + "\n", "audit.md": page}
    files |= {"audit_labels.svg": labels, "audit_chosen.svg": chosen}
    for name, text in files.items():
        partial = output / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, output / name)
