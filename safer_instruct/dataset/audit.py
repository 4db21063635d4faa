"""Audit any dataset in the schema of `si`: find rows that are empty, repeated, collapsed, or taken from a test set.

Rows are streamed, and repetitions are found by hash (`scratch.Scratch`). The report holds counts, hashes and lengths,
never text.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from config.settings import DuplicatesSettings
from safer_instruct.dataset.files import HISTORY, HISTORY_SCHEMA, SCHEMA, write_dataset
from safer_instruct.dataset.reviews import pair_hash
from safer_instruct.dataset.rows import TEXT_COLUMNS, dataset_rows, row_example, row_label, unicode
from safer_instruct.dataset.scratch import INT, TEXT, Scratch, lock_output, open_scratch, record_batches, table_schema
from safer_instruct.dataset.similarity import LeakageGuard, find_near_duplicates
from safer_instruct.measures.shortcuts import shortcuts
from safer_instruct.text.examples import normalise, text_id
from safer_instruct.text.exclusion import turn_keys
from safer_instruct.text.messages import write_history
from safer_instruct.text.refusals import declines

TOP_CHOSEN = 10
MAX_PAIRS = 20_000  # pairs searched for shortcuts: enough to know an AUC to 0.01
MAX_LABELS = 255  # in the report; later labels of the dataset are counted together
OTHER_LABELS = "(others)"
# The possible findings about a row; the first that applies is the reason why the cleaned dataset drops it.
FINDINGS = ("leak", "near_leak", "duplicate_pair", "near_duplicate_pair", "repeated_chosen")

# `pair`, `instruction` and `chosen` are hashes of normalised texts, `characters` is the length of `chosen`.
_AUDITED = table_schema(
    n=INT, label=TEXT, guard=TEXT, characters=INT, answered=INT, words_instruction=INT, words_rejected=INT,
    words_chosen=INT, pair=TEXT, instruction=TEXT, chosen=TEXT,
)  # fmt: skip
_NUMBERED = "SELECT *, row_number() OVER (PARTITION BY {key} ORDER BY n) AS nth_{key} FROM {table}"
_FOUND = """
    SELECT numbered.n, label, guard = 'excluded_instruction' AS leak, guard = 'near_excluded_instruction' AS near_leak,
        nth_pair > 1 AS duplicate_pair, near.n IS NOT NULL AND nth_pair = 1 AS near_duplicate_pair,
        characters > 0 AND nth_chosen > coalesce(?, nth_chosen) AS repeated_chosen,
        words_instruction = 0 AS empty_instruction, words_rejected = 0 AS empty_rejected,
        words_chosen = 0 AS empty_chosen, answered = 1 AS answered
    FROM numbered LEFT JOIN near_duplicates AS near ON near.n = numbered.n
"""
_QUANTILES = """
    WITH sizes AS (SELECT words_{column} AS words, count(*) AS number FROM audited WHERE words > 0 GROUP BY words),
    ranks AS (SELECT *, sum(number) OVER (ORDER BY words) / sum(number) OVER () AS rank FROM sizes)
    SELECT round(sum(words * number) / sum(number), 1), min(words) FILTER (rank >= 0.5),
        min(words) FILTER (rank >= 0.95), max(words)
    FROM ranks
"""


def audit(
    path: str,
    *,
    guard: LeakageGuard,
    duplicates: DuplicatesSettings,
    max_same_chosen: int | None,
    output: Path | None,
    format: str = "all",
) -> dict[str, Any]:
    """Count the problems of a dataset, and write a dataset without them if `output` is given.

    `path` has the columns instruction and chosen, and optionally rejected, label, id and provenance. At most
    `max_same_chosen` rows keep the same safe response; None keeps all. Returns the report as JSON values.
    """
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(lock_output(output))
            folder = output / ".audit"
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "audit"
        scratch = stack.enter_context(open_scratch(folder, duplicates.index))
        scratch.create("audited", _AUDITED, _measured(path, guard))
        pairs = ((n, row_example(*one)) for n, one in enumerate(dataset_rows(path)))
        find_near_duplicates(pairs, duplicates.threshold, scratch)
        scratch.derive("with_pairs", _NUMBERED.format(key="pair", table="audited"))
        scratch.derive("numbered", _NUMBERED.format(key="chosen", table="with_pairs"))
        scratch.derive("found", _FOUND, max_same_chosen, order="n")
        report = {"path": Path(path).name, "findings": list(FINDINGS), **_report(scratch, guard)}
        found = shortcuts(_sampled_pairs(path, report))
        report["shortcuts"] = {name: {label: asdict(one) for label, one in of.items()} for name, of in found.items()}
        if output is not None:
            dropped: Counter[str] = Counter()
            schema = HISTORY_SCHEMA if any(row_example(*one).before for one in dataset_rows(path)) else SCHEMA
            cleaned = record_batches(schema, _clean_rows(path, scratch, dropped, schema.names))
            num_rows = write_dataset(output, format, cleaned, schema)
            report["cleaned"] = {"rows": num_rows, "dropped": dict(sorted(dropped.items()))}
    return report


def _measured(path: str, guard: LeakageGuard) -> Iterator[tuple[Any, ...]]:
    """Yield a row of _AUDITED for each row of the dataset."""
    labels: set[str] = set()
    for n, (where, row, texts) in enumerate(dataset_rows(path)):
        pair, label = row_example(where, row, texts), row_label(row)
        if len(labels) < MAX_LABELS:
            labels.add(label)
        normalised = [normalise(text) for text in texts.values()]
        yield (
            n,
            label if label in labels else OTHER_LABELS,
            guard.reason_of(pair),
            len(texts["chosen"]),
            int(bool(texts["chosen"]) and not declines(texts["chosen"])),
            *(len(text.split()) for text in texts.values()),
            pair_hash(texts["instruction"], texts["rejected"], texts["chosen"], pair.before),
            text_id(turn_keys(pair)[-1]),
            text_id(normalised[2]),
        )


def _report(scratch: Scratch, guard: LeakageGuard) -> dict[str, Any]:
    """Return the counts of the report; see `audit`."""
    names = ["answered", *(f"empty_{column}" for column in TEXT_COLUMNS), *FINDINGS]
    sums = ", ".join(f"count(*) FILTER ({name})" for name in names)
    counts = scratch.query(f"SELECT label, count(*), {sums} FROM found GROUP BY label ORDER BY min(n)")
    by_label = {label: dict(zip(["rows", *names], found, strict=True)) for label, *found in counts}
    total = {name: sum(found[name] for found in by_label.values()) for name in ["rows", *names]}
    sizes = "SELECT count(*), count(*) FILTER (size > 1) FROM (SELECT count(*) AS size FROM audited GROUP BY {})"
    ((distinct, repeated),) = scratch.query(sizes.format("instruction"))
    ((num_chosen, _),) = scratch.query(sizes.format("chosen"))
    leaks = "SELECT count(DISTINCT instruction) FROM audited WHERE guard = 'excluded_instruction'"
    ((leaked,),) = scratch.query(leaks)
    most_frequent = scratch.query(
        """SELECT count(*) AS number, arg_min(characters, n) AS length FROM audited WHERE characters > 0
        GROUP BY chosen ORDER BY number DESC, length DESC LIMIT ?""",
        TOP_CHOSEN,
    )
    return {
        "rows": total["rows"],
        "total": total,
        "by_label": by_label,
        "chosen": {
            "distinct": num_chosen,
            "most_frequent": [{"rows": rows, "characters": length} for rows, length in most_frequent],
        },
        "instructions": {"distinct": distinct, "with_several_rows": repeated},
        "test_set": {"instructions": len(guard.exact), "found_in_dataset": leaked},
        "words": {column: _quantiles(scratch, column) for column in TEXT_COLUMNS},
    }


def _sampled_pairs(path: str, report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (instruction, label, chosen, rejected) of at most MAX_PAIRS pairs, evenly spread over the dataset."""
    step = max(1, -(-report["rows"] // MAX_PAIRS))
    for _, row, texts in islice(dataset_rows(path), 0, None, step):
        if texts["chosen"] and texts["rejected"]:
            label = row_label(row)
            label = label if label in report["by_label"] else OTHER_LABELS
            yield texts["instruction"], label, texts["chosen"], texts["rejected"]


def _quantiles(scratch: Scratch, column: str) -> dict[str, float]:
    """Return mean, median, 95th percentile and maximum number of words of the non-empty cells."""
    (found,) = scratch.query(_QUANTILES.format(column=column))
    return {name: value or 0 for name, value in zip(("mean", "median", "p95", "max"), found, strict=True)}


def _clean_rows(
    path: str, scratch: Scratch, dropped: Counter[str], columns: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """Yield the rows without a finding of FINDINGS, and count the others by their first finding."""
    findings = scratch.rows("found", FINDINGS)
    for (where, row, texts), found in zip(dataset_rows(path), findings, strict=True):
        reason = next((name for name, is_found in zip(FINDINGS, found, strict=True) if is_found), None)
        if reason:
            dropped[reason] += 1
            continue
        pair = row_example(where, row, texts)
        cells = {
            "id": pair.id, **texts, "label": pair.label,
            "provenance": json.dumps(_provenance(row) or {"source": Path(where).name}, ensure_ascii=False),
            HISTORY: write_history(pair.before),
        }  # fmt: skip
        yield tuple(unicode(cells[column]) for column in columns)


def _provenance(row: Mapping[str, Any]) -> Any:
    """Return where a row says that it stems from: as our files have it, or a text of somebody else's."""
    found = row.get("provenance")
    try:
        return json.loads(found) if isinstance(found, str) else found
    except (ValueError, RecursionError):
        return {"source": found}
