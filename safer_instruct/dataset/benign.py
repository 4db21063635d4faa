"""Build the pairs of stage=replay and stage=contrast from their ledgers: the chosen response answers the prompt.

The pairs depend only on the input files, the ledgers and the rules below, not on the number of shards. The rejected
response to a harmless prompt is a refusal from the unsafe dataset itself: canned refusals would teach the model that
declining is wrong, whatever is asked.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.files import replacing, write_text
from safer_instruct.dataset.rows import dataset_rows, row_example
from safer_instruct.experts.verdicts import HARMLESS
from safer_instruct.induction.benign import ANSWER, CONTRAST, NEIGHBOUR, REPLAY, SCREEN
from safer_instruct.induction.ledger import Record
from safer_instruct.text.examples import Example, normalise, text_id
from safer_instruct.text.refusals import declines

MAX_REFUSALS = 20_000  # distinct refusals of a dataset to draw from
MAX_LEAD = 3  # how many uses a refusal may be ahead of the least used one
COMMON, FEW = 0.1, 20  # a word in more than this share, and this number, of the refusals' instructions is no topic
# Verdicts that imply an unsafe instruction, whether or not the old response fits it.
UNSAFE = ("keep", "response_does_not_fit", "category_mismatch", "slot_mismatch")
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
_WORD = re.compile(r"[a-z]{4,}")

# Advice for the reason that dropped the most rows.
_ADVICE = {
    "neighbour_unsafe": ". The expert calls neighbours harmful that it wrote itself: choose another expert",
    "refused": ". The answers decline harmless prompts: choose another model",
    "truncated": ". The answers are cut off before their first sentence ends: raise generation.max_new_tokens",
}

Pair = dict[str, Any]


def read_unsafe_rows(path: str) -> list[Example]:
    """Read the rows of a dataset in the schema of `si` that have an instruction and a chosen response.

    Raises:
        UserError: The file is missing or broken, lacks a column, or holds no such row.
    """
    rows = []
    for where, row, texts in dataset_rows(path):
        if texts["instruction"] and texts["chosen"]:
            rows.append(row_example(where, row, texts))
    if not rows:
        raise UserError(f"path={path}: none of its rows has an instruction and a chosen response")
    return rows


class Refusals:
    """The refusals among a dataset's chosen responses, drawn by topic and used about equally often."""

    def __init__(self, rows: Sequence[Example], path: str) -> None:
        """Collect the distinct refusals.

        Raises:
            UserError: No chosen response of the dataset at `path` declines.
        """
        distinct: dict[str, Example] = {}
        for row in rows:
            if len(distinct) < MAX_REFUSALS and declines(row.chosen or ""):
                distinct.setdefault(normalise(row.chosen or ""), row)
        if not distinct:
            raise UserError(
                f"path={path}: none of its {len(rows)} chosen responses declines, so there is no refusal to reject; "
                "give the dataset of the unsafe prompts, or leave `rejected` empty with replay.rejected=none"
            )
        self._rows = sorted(distinct.values(), key=lambda row: text_id("refusal", row.chosen or ""))
        self._uses = [0] * len(self._rows)
        self._next = 0
        self._holders: dict[str, list[int]] = defaultdict(list)  # word -> refusals whose instruction has it
        for number, row in enumerate(self._rows):
            for word in _words(row.instruction or ""):
                self._holders[word].append(number)

    def draw(self, instruction: str) -> Example:
        """Draw the refusal for a prompt: the row that shares the most rare words with it, else the least used one."""
        least = min(self._uses)
        shared: dict[int, float] = defaultdict(float)
        for word in _words(instruction):
            holders = self._holders.get(word, ())
            if len(holders) <= max(FEW, COMMON * len(self._rows)):
                for number in holders:
                    shared[number] += 1 / len(holders)
        near = [number for number in shared if self._uses[number] < least + MAX_LEAD]
        drawn = max(near, key=lambda n: (shared[n], -self._uses[n], -n)) if near else self._least_used(least)
        self._uses[drawn] += 1
        return self._rows[drawn]

    def _least_used(self, least: int) -> int:
        while self._uses[self._next] > least:
            self._next = (self._next + 1) % len(self._rows)
        return self._next


def _words(text: str) -> list[str]:
    return sorted(set(_WORD.findall(text.casefold())))


def whole_sentences(text: str) -> str:
    """Return a cut-off text up to its last whole sentence; "" if it has none."""
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    return text[: ends[-1]] if ends else ""


def replay_pairs(
    prompts: Sequence[Example],
    records: Mapping[str, Record],
    refusals: Refusals | None,
    *,
    answered_by: str,
    counts: Counter[str],
) -> Iterator[Pair]:
    """Yield a pair for each prompt whose answer can be chosen, in order.

    Without `refusals`, the rejected response is empty. `answered_by` is the name of the starting model, or "file".
    """
    for prompt in prompts:
        record = records[prompt.id]
        chosen = whole_sentences(record["answer"]) if record["truncated"] else record["answer"]
        if reason := _why_not_chosen(record, chosen):
            counts[reason] += 1
            continue
        counts.update(pairs=1, cut_to_whole_sentences=int(record["truncated"]))
        drawn = None if refusals is None else refusals.draw(prompt.instruction or "")
        provenance = {**prompt.provenance, "kind": REPLAY, "answered_by": answered_by}
        if drawn is not None:
            provenance["rejected_from"] = drawn.id
        rejected = drawn.chosen if drawn is not None else None
        yield _pair(prompt.id, prompt.instruction, rejected, chosen, "benign", provenance)


def _why_not_chosen(record: Record, chosen: str) -> str:
    if record.get("error"):
        return "generation_failed"
    if record.get("prompt_cut"):
        return "prompt_cut"
    if not chosen:
        return "truncated" if record["truncated"] else "empty_answer"
    return "refused" if declines(chosen) else ""


def contrast_pairs(
    rows: Sequence[Example],
    records: Mapping[str, Mapping[str, Record]],
    refusals: Refusals,
    *,
    excluded: Callable[[str], str],
    counts: Counter[str],
) -> Iterator[Pair]:
    """Yield a pair for each unsafe row with a harmless, answered neighbour, in order.

    If a row's own safe response does not decline, a refusal is drawn for it. Neighbours in a test set are left out.
    """
    seen = {normalise(row.instruction or "") for row in rows}
    for row in rows:
        neighbour = records[NEIGHBOUR][row.id]["neighbour"]
        answer = records[ANSWER].get(row.id, {})
        reason = _why_no_contrast(row.id, records) or excluded(normalise(neighbour))
        reason = reason or ("repeated_neighbour" if normalise(neighbour) in seen else "")
        if reason:
            counts[reason] += 1
            continue
        seen.add(normalise(neighbour))
        counts["pairs"] += 1
        own = declines(row.chosen or "")
        refusal = row if own else refusals.draw(row.instruction or "")
        provenance = {"source": row.id, "kind": CONTRAST, "rejected_from": refusal.id}
        yield _pair(text_id(neighbour), neighbour, refusal.chosen, answer["answer"], row.label, provenance)


def _why_no_contrast(id: str, records: Mapping[str, Mapping[str, Record]]) -> str:
    neighbour = records[NEIGHBOUR][id]
    if neighbour["neighbour"] is None:
        return f"neighbour_{neighbour['reason']}"
    verdict = records[SCREEN][id]["reason"]
    if verdict != HARMLESS:
        return "neighbour_unsafe" if verdict in UNSAFE else f"neighbour_{verdict}"
    answer = records[ANSWER][id]
    if answer["answer"] is None:
        return f"answer_{answer['reason']}"
    return "refused" if declines(answer["answer"]) else ""


def _pair(
    id: str, instruction: str | None, rejected: str | None, chosen: str, label: str, provenance: Mapping[str, Any]
) -> Pair:
    texts = {"instruction": instruction, "rejected": rejected or "", "chosen": chosen}
    return {"id": id, **texts, "label": label, "provenance": dict(provenance)}


def write_pairs(output: Path, name: str, pairs: Iterator[Pair], report: Mapping[str, Any]) -> None:
    """Write NAME.jsonl and then report.json, each atomically; drawing `pairs` completes the counts of `report`.

    Raises:
        UserError: There is no pair; then neither file is written.
    """
    path = output / f"{name}.jsonl"
    # A server may send half of a surrogate pair; it is written as its escape, which JSON reads back unchanged.
    with replacing(path, durable=True) as part, part.open("w", encoding="utf-8", errors="backslashreplace") as file:
        num_pairs = 0
        for pair in pairs:
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
            num_pairs += 1
        if not num_pairs:
            found = ", ".join(f"{reason} {number}" for reason, number in sorted(report["counts"].items()) if number)
            raise UserError(
                f"stage={name} made no pairs, so {path.name} is not written. Why the rows were dropped: {found}"
                + _ADVICE.get(max(report["counts"], key=lambda reason: report["counts"][reason], default=""), "")
            )
    write_text(output / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
