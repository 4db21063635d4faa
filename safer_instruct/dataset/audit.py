"""A look over any dataset in the schema of `si`: what is empty, repeated, collapsed, or taken from a test set.

Rows are streamed, and repetitions are found by their hashes (`scratch.Scratch`). The report has counts, hashes and
lengths, never text.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from config.files import write_text
from config.paths import find_path
from config.settings import DuplicatesSettings
from safer_instruct.dataset.files import SCHEMA, write_dataset
from safer_instruct.dataset.scratch import INT, TEXT, Scratch, lock_output, open_scratch, record_batches, table_schema
from safer_instruct.dataset.similarity import LeakageGuard, find_near_duplicates
from safer_instruct.measures.shortcuts import Auc, shortcuts
from safer_instruct.report.dataset_plots import plot_parts
from safer_instruct.text.display import escape_markdown, markdown_table
from safer_instruct.text.examples import normalise, text_id
from safer_instruct.text.readers import read_rows, require_columns
from safer_instruct.text.refusals import declines
from safer_instruct.text.row_log import MIN_ANSWERED

TEXT_COLUMNS = ("instruction", "rejected", "chosen")
TOP_CHOSEN = 10
MAX_PAIRS = 20_000  # that shortcuts are looked for in: an AUC is then known to 0.01
MAX_LABELS = 255  # of the report; those that come after them in the dataset are counted together
UNLABELLED, OTHER_LABELS = "(none)", "(others)"
# What is found about a row; the first that applies is why the cleaned dataset is without it.
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
    """Count what is wrong with a dataset, and write one without it if there is an `output`.

    Args:
        path: File or folder with columns instruction and chosen, and perhaps rejected, label, id, provenance.
        guard: Instructions of a test set.
        duplicates: Which pairs are nearly repeated.
        max_same_chosen: Rows with one safe response that stay; None keeps all.
        output: Folder of the cleaned dataset, None for none.
        format: Of the cleaned dataset.

    Returns:
        The report as JSON values.
    """
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(lock_output(output))
            folder = output / ".audit"
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "audit"
        scratch = stack.enter_context(open_scratch(folder, duplicates.index))
        scratch.create("audited", _AUDITED, _measured(path, guard))
        texts = ((n, f"{row['instruction']}\n{row['rejected']}") for n, (_, _, row) in enumerate(dataset_rows(path)))
        find_near_duplicates(texts, duplicates.threshold, scratch)
        scratch.derive("with_pairs", _NUMBERED.format(key="pair", table="audited"))
        scratch.derive("numbered", _NUMBERED.format(key="chosen", table="with_pairs"))
        scratch.derive("found", _FOUND, max_same_chosen, order="n")
        report = {"path": Path(path).name, **_report(scratch, guard)}
        found = shortcuts(_sampled_pairs(path, report))
        report["shortcuts"] = {name: {label: asdict(one) for label, one in of.items()} for name, of in found.items()}
        if output is not None:
            dropped: Counter[str] = Counter()
            cleaned = record_batches(SCHEMA, _clean_rows(path, scratch, dropped))
            num_rows = write_dataset(output, format, cleaned)
            report["cleaned"] = {"rows": num_rows, "dropped": dict(sorted(dropped.items()))}
    return report


def dataset_rows(path: str) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Yield (place, row, its texts), empty ones as ""."""
    for n, (where, row) in enumerate(read_rows(find_path(path))):
        if n == 0:
            require_columns(row, ["instruction", "chosen"], where)
        yield where, row, {column: str(row.get(column) or "").strip() for column in TEXT_COLUMNS}


def _measured(path: str, guard: LeakageGuard) -> Iterator[tuple[Any, ...]]:
    """Yield a row of _AUDITED for each row of the dataset."""
    labels: set[str] = set()
    for n, (_, row, texts) in enumerate(dataset_rows(path)):
        label = _label(row)
        if len(labels) < MAX_LABELS:
            labels.add(label)
        normalised = [normalise(text) for text in texts.values()]
        yield (
            n,
            label if label in labels else OTHER_LABELS,
            guard.reason(normalised[0]),
            len(texts["chosen"]),
            int(bool(texts["chosen"]) and not declines(texts["chosen"])),
            *(len(text.split()) for text in texts.values()),
            text_id(*normalised),
            text_id(normalised[0]),
            text_id(normalised[2]),
        )


def _report(scratch: Scratch, guard: LeakageGuard) -> dict[str, Any]:
    """Return the counts; see audit."""
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
    """Yield (instruction, label, chosen, rejected) of the pairs, at most MAX_PAIRS of them, evenly spread."""
    step = max(1, -(-report["rows"] // MAX_PAIRS))
    for _, row, texts in islice(dataset_rows(path), 0, None, step):
        if texts["chosen"] and texts["rejected"]:
            label = _label(row)
            label = label if label in report["by_label"] else OTHER_LABELS
            yield texts["instruction"], label, texts["chosen"], texts["rejected"]


def _label(row: Mapping[str, Any]) -> str:
    # A lone surrogate, which JSON can hold, is no UTF-8.
    return str(row.get("label") or UNLABELLED).encode("utf-8", "backslashreplace").decode()


def _quantiles(scratch: Scratch, column: str) -> dict[str, float]:
    """Return mean, median, 95th percentile and maximum of the words of the cells that are not empty."""
    (found,) = scratch.query(_QUANTILES.format(column=column))
    return {name: value or 0 for name, value in zip(("mean", "median", "p95", "max"), found, strict=True)}


def _clean_rows(path: str, scratch: Scratch, dropped: Counter[str]) -> Iterator[tuple[str, ...]]:
    """Yield the rows in which nothing was found that must go, and count the others."""
    findings = scratch.rows("found", FINDINGS)
    for (where, row, texts), found in zip(dataset_rows(path), findings, strict=True):
        reason = next((name for name, is_found in zip(FINDINGS, found, strict=True) if is_found), None)
        if reason:
            dropped[reason] += 1
            continue
        provenance = row.get("provenance") or {"source": Path(where).name}
        if isinstance(provenance, str):
            provenance = json.loads(provenance)
        id = str(row.get("id") or text_id(*texts.values()))
        label = str(row.get("label") or "")
        yield id, *texts.values(), label, json.dumps(provenance, ensure_ascii=False)


def render_audit(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    names = list(report["total"])
    labels = [(escape_markdown(label), counts) for label, counts in report["by_label"].items()]
    table = [(label, *(counts[name] for name in names)) for label, counts in [*labels, ("**all**", report["total"])]]
    parts = [markdown_table(["label", *(name.replace("_", " ") for name in names)], table, markup=[0])]
    rows = max(1, report["rows"])
    chosen, test = report["chosen"], report["test_set"]
    most = ", ".join(
        f"{one['rows']} rows ({100 * one['rows'] / rows:.1f}%) one text of {one['characters']} characters"
        for one in chosen["most_frequent"][:3]
        if one["rows"] > 1
    )
    sentences = [f"Safe responses: {chosen['distinct']} distinct" + (f"; {most}" if most else "") + "."]
    sentences.append(
        f"Instructions: {report['instructions']['distinct']} distinct, "
        f"{report['instructions']['with_several_rows']} with more than one row."
    )
    if test["instructions"]:
        sentences.append(
            f"Test set: {test['found_in_dataset']} of its {test['instructions']} instructions are in the data."
        )
    parts.append("\n".join([*sentences, answered_sentence(report["total"])]))
    parts.append(render_shortcuts(report["shortcuts"]))
    words = [(column, *values.values()) for column, values in report["words"].items()]
    parts.append(markdown_table(["words", "mean", "median", "95%", "most"], words))
    if "cleaned" in report:
        drops = ", ".join(f"{reason} {n}" for reason, n in report["cleaned"]["dropped"].items()) or "nothing"
        parts.append(f"Written without them: {report['cleaned']['rows']} rows (dropped: {drops}).")
    return "\n\n".join(parts)


def answered_sentence(total: Mapping[str, int]) -> str:
    """Say how many prompts should be answered, loudly where these are as good as none."""
    rows, answered = max(1, total["rows"]), total["answered"]
    told = f"Prompts that should be answered (the chosen response does not decline): {answered} of {total['rows']}"
    told += f" ({answered / rows:.1%})."
    if answered >= MIN_ANSWERED * rows:
        return told
    return (
        f"**{told} A model trained on this dataset alone learns to decline harmless prompts, too: mix in pairs that "
        "answer (stage=replay, stage=contrast).**"
    )


def render_shortcuts(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the table of AUCs with 95% intervals, a row for each label, and a sentence for each shortcut."""
    names = [name.replace("_", " ") for name in found]
    labels = next(iter(found.values()))
    rows = [
        (
            "**all**" if not label else escape_markdown(label),
            labels[label]["n"],
            *(_auc_text(of[label]) for of in found.values()),
        )
        for label in [*(one for one in labels if one), ""]
    ]
    heading = "How far chosen and rejected are told apart by shallow means (AUC; 0.5: not at all, 0 or 1: wholly):"
    lines = [f"{heading}\n\n{markdown_table(['label', 'pairs', *names], rows, markup=[0])}"]
    if told := [
        f"{name} (AUC {_auc_text(of[''])})" for name, of in zip(names, found.values(), strict=True) if _tells(of[""])
    ]:
        lines.append(
            f"**Chosen and rejected are told apart by {', by '.join(told)} alone, so a model can learn that in "
            "place of what is harmful: mix in pairs with an answer chosen and a refusal rejected (stage=replay, "
            "stage=contrast), and vary the safe responses.**"
        )
    return "\n\n".join(lines)


def _auc_text(one: Mapping[str, Any]) -> str:
    return "-" if one["value"] is None else f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def _tells(one: Mapping[str, Any]) -> bool:
    return Auc(**one).is_shortcut


def write_audit(report: Mapping[str, Any], output: Path) -> None:
    """Write audit.json, audit.md and its figures, each as a whole or not at all."""
    bars = {}
    for label, counts in report["by_label"].items():
        found = min(counts["rows"], sum(counts[name] for name in FINDINGS))
        bars[label] = [counts["rows"] - found, found]
    labels = plot_parts(bars, [("nothing found", "#0072B2"), ("something found", "#E69F00")], "rows")
    most = {
        f"{one['characters']} characters (no. {number})": [one["rows"], report["rows"] - one["rows"]]
        for number, one in enumerate(report["chosen"]["most_frequent"], start=1)
    }
    chosen = plot_parts(most, [("rows with this response", "#D55E00"), ("other rows", "#D9DDE3")], "rows")
    page = f"# Audit of {escape_markdown(report['path'])}\n\n{render_audit(report)}\n\n"
    page += "![Rows of each label](audit_labels.svg)\n\n![The most frequent safe responses](audit_chosen.svg)\n"
    write_text(output / "audit.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text(output / "audit.md", page)
    write_text(output / "audit_labels.svg", labels)
    write_text(output / "audit_chosen.svg", chosen)
