"""Merge the ledgers of all shards into one dataset, in the order of the corpus.

The dataset depends only on the corpus, the ledgers and the rules below, not on the number of shards. DuckDB joins ids,
hashes and the places of records (`scratch.Scratch`); the texts are streamed past it, so memory does not grow with them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress, islice
from pathlib import Path
from typing import Any

import pyarrow

from config.errors import UserError
from config.settings import CorpusSettings, DuplicatesSettings
from safer_instruct.dataset.files import HISTORY_SCHEMA, SCHEMA, write_dataset
from safer_instruct.dataset.reviews import NOTHING_REJECTED, Rejections
from safer_instruct.dataset.scratch import FLOAT, INT, LONG, TEXT, Scratch, lock_output, open_scratch, table_schema
from safer_instruct.dataset.similarity import LeakageGuard, find_near_duplicates
from safer_instruct.induction.ledger import Record, is_final
from safer_instruct.induction.ledgers import StageLedgers, provenance_of_all
from safer_instruct.induction.stages import (
    FILTER,
    INDUCE,
    RESPOND,
    SCORE,
    STAGES,
    VARY,
    require_same_instruction,
    unfinished,
    with_instruction,
    with_score,
)
from safer_instruct.induction.vary import final_response, require_varied, variation
from safer_instruct.text.corpus import CorpusRows, Dropped, repetition
from safer_instruct.text.examples import Example, normalise, text_id
from safer_instruct.text.messages import read_history, write_history

MERGE = "merge"
BLOCK_ROWS = 16_384  # rows whose records are read from the ledgers at a time

_CORPUS = table_schema(n=INT, id=TEXT, response=TEXT, rejected=TEXT, label=TEXT, source=TEXT, history=TEXT)
# Dropped rows have a `stage` and a `reason` but no texts. Pairs with the same texts have the same `key`.
_PAIRS = table_schema(
    n=INT, label=TEXT, stage=TEXT, reason=TEXT, key=TEXT, score=FLOAT,
    id=TEXT, history=TEXT, instruction=TEXT, rejected=TEXT, chosen=TEXT, provenance=TEXT,
)  # fmt: skip
# The first row of each id is kept; of those, the first row of each response.
_REPEATED_ROWS = """
    WITH ids AS (SELECT n, response, source, row_number() OVER (PARTITION BY id ORDER BY n) AS place FROM corpus),
    texts AS (SELECT n, source, row_number() OVER (PARTITION BY response ORDER BY n) AS place FROM ids WHERE place = 1)
    SELECT n, true AS same_id, source FROM ids WHERE place > 1
    UNION ALL SELECT n, false, source FROM texts WHERE place > 1
"""
# Of pairs that differ only in case and whitespace, the first is kept.
_REPEATED_PAIRS = """
    WITH numbered AS (SELECT n, row_number() OVER (PARTITION BY key ORDER BY n) AS place FROM pairs WHERE reason = '')
    SELECT n, 'duplicate_pair' AS reason FROM numbered WHERE place > 1
"""
_FATES = """
    SELECT pairs.n, label, score, if(repeated.n IS NULL, stage, 'merge') AS stage,
        coalesce(repeated.reason, pairs.reason) AS reason
    FROM pairs LEFT JOIN {repeated} AS repeated ON repeated.n = pairs.n
"""


@dataclass
class Merged:
    """The result of a merge: everything that the report and the card need."""

    ledgers: Mapping[str, StageLedgers]  # by stage
    corpus_rows: int = 0  # rows of the corpus, usable or not
    corpus_dropped: Dropped = field(default_factory=Dropped)  # the unusable and repeated ones among them
    # The other rows: (label, stage that dropped it, reason) -> rows; stage and reason are "" for rows in the dataset.
    fates: dict[tuple[str, str, str], int] = field(default_factory=dict)
    induced: Counter[str] = field(default_factory=Counter)  # truncated, prompt_cut -> rows
    tokens: Counter[str] = field(default_factory=Counter)  # stage -> tokens used
    cost: Counter[str] = field(default_factory=Counter)  # stage -> cost
    varied: Counter[str] = field(default_factory=Counter)  # asked_again, still_the_same -> rows
    # Round-trip scores in bins of 0.1: lower edge x 10 -> (rows scored, those of them in the dataset).
    scores: dict[int, list[int]] = field(default_factory=dict)
    num_rows: int = 0  # rows of the dataset
    schema: pyarrow.Schema = SCHEMA  # with a history column if the corpus has conversations

    def num_dropped(self, *, label: str | None = None, stage: str | None = None) -> Counter[str]:
        """Return reason -> rows dropped, for one label and stage; None: for all of them."""
        reasons: Counter[str] = Counter()
        for (of_label, of_stage, reason), number in self.fates.items():
            if reason and label in (None, of_label) and stage in (None, of_stage):
                reasons[reason] += number
        return reasons


def merge(
    corpus: CorpusSettings,
    ledgers: Mapping[str, StageLedgers],
    output: Path,
    *,
    guard: LeakageGuard,
    duplicates: DuplicatesSettings,
    format: str,
    rejections: Rejections = NOTHING_REJECTED,
) -> Merged:
    """Write the dataset; each of its files appears atomically.

    `ledgers` come from `find_ledgers`; `format` is a key of `files.FILES`.

    Raises:
        UserError: A stage has not finished some rows, the corpus has changed or cannot be read to its end, or another
            process is writing into the folder.
    """
    with lock_output(output), open_scratch(output / ".merge", duplicates.index) as scratch:
        job = _Merge(corpus, ledgers, guard, rejections, scratch)
        require_varied(ledgers)
        job.read_ledgers()
        job.read_corpus()
        scratch.create("pairs", _PAIRS, job.pairs())
        job.mark_repeated_pairs(duplicates.threshold)
        job.count()
        job.merged.num_rows = write_dataset(output, format, job.dataset(), job.merged.schema)
        return job.merged


class _Merge:
    """The steps of `merge`, in the order of their calls. `n` is the number of a usable row of the corpus."""

    def __init__(
        self, corpus: CorpusSettings, ledgers: Mapping[str, StageLedgers], guard: LeakageGuard,
        rejections: Rejections, scratch: Scratch,
    ) -> None:  # fmt: skip
        self.merged = Merged(ledgers)
        self._settings = corpus
        self._guard = guard
        self._rejections = rejections
        self._scratch = scratch

    def read_ledgers(self) -> None:
        """Find the place of each record, and sum up tokens and cost."""
        self._scratch.create("records", table_schema(stage=TEXT, id=TEXT, place=LONG, final=LONG), self._records())
        # If a row has several records in a ledger, the first final one counts, else the last one.
        places = ", ".join(
            f"coalesce(min(place) FILTER (stage = '{s}' AND final = 1), max(place) FILTER (stage = '{s}')) AS {s}_place"
            for s in self.merged.ledgers
        )
        self._scratch.derive("places", f"SELECT id, {places} FROM records GROUP BY id")

    def _records(self) -> Iterator[tuple[str, str, int, int]]:
        for stage, ledgers in self.merged.ledgers.items():
            for record, place in ledgers.records():
                self.merged.tokens[stage] += record["tokens"]
                self.merged.cost[stage] += record.get("cost", 0.0)
                yield stage, record["id"], place, int(is_final(record))

    def read_corpus(self) -> None:
        """Copy the usable rows of the corpus, and find the repeated ones."""
        rows = CorpusRows(self._settings)
        usable = (
            (n, row.id, row.response_id, row.rejected, row.label, row.provenance["source"], self._history(row))
            for n, row in enumerate(rows)
        )
        self._scratch.create("corpus", _CORPUS, usable)
        if rows.broken:
            raise UserError(f"{rows.broken}. The corpus must be readable to its end before stage=merge")
        self.merged.corpus_rows, self.merged.corpus_dropped = rows.num_rows, rows.dropped
        self._scratch.derive("repeated_rows", _REPEATED_ROWS, order="n")
        for same_id, source in self._scratch.rows("repeated_rows", ["same_id", "source"]):
            self.merged.corpus_dropped.count(repetition(self._settings, same_id=same_id), source)

    def _history(self, row: Example) -> str:
        said = write_history(row.before)
        self.merged.schema = HISTORY_SCHEMA if said else self.merged.schema
        return said

    def pairs(self) -> Iterator[tuple[Any, ...]]:
        """Yield a row of _PAIRS for each row of the corpus that is not a repetition."""
        missing: Counter[str] = Counter()
        num_rows = 0
        for n, example, records in self._joined():
            num_rows += 1
            if absent := self._absent(records):
                missing[absent] += 1
            else:
                yield n, *self._pair(example, records)
        for stage in (stage for stage in STAGES if missing[stage]):
            raise unfinished(f"{missing[stage]} of {num_rows}", stage)

    def _joined(self) -> Iterator[tuple[int, Example, dict[str, Record]]]:
        """Yield the rows of the corpus, except repeated ones, with the records that exist."""
        stages = list(self.merged.ledgers)
        first = "SELECT n, id FROM corpus ANTI JOIN repeated_rows USING (n)"
        self._scratch.derive("first_rows", first)
        self._scratch.derive("joined", "FROM first_rows LEFT JOIN places USING (id)", order="n")
        joined = self._scratch.rows("joined", ["n", *(f"{stage}_place" for stage in stages)])
        rows = self._scratch.rows("corpus", ["n", "id", "rejected", "label", "source", "history"])
        while block := list(islice(joined, BLOCK_ROWS)):
            numbers, *places = zip(*block, strict=True)
            lines = [self.merged.ledgers[s].lines(of_stage) for s, of_stage in zip(stages, places, strict=True)]
            for number, *of_row in zip(numbers, *lines, strict=True):
                n, id, rejected, label, source, said = next(row for row in rows if row[0] == number)
                records = {s: json.loads(line) for s, line in zip(stages, of_row, strict=True) if line}
                about: dict[str, Any] = {"label": label, "provenance": {"source": source}, **read_history(said)}
                yield n, Example(id, rejected=rejected, **about), records

    def _absent(self, records: Mapping[str, Record]) -> str:
        """Return the first stage that the row still needs; "" if none."""
        needed = [stage for stage in self.merged.ledgers if stage not in (RESPOND, VARY)]
        if FILTER in records and records[FILTER]["keep"]:
            needed.append(RESPOND)
        return next((stage for stage in needed if stage not in records), "")

    def _pair(self, example: Example, records: Mapping[str, Record]) -> tuple[Any, ...]:
        """Return a row of _PAIRS without its number."""
        induced, verdict, answer = records[INDUCE], records[FILTER], final_response(records)
        pair = with_instruction(example, induced)
        if SCORE in records:
            pair = with_score(pair, records[SCORE])
        for stage in (FILTER, RESPOND, VARY):
            require_same_instruction(pair, records.get(stage, {}), stage)
        label = pair.label or verdict["label"]
        score = pair.provenance.get("round_trip")
        self.merged.varied.update(variation(records))
        self.merged.induced.update(name for name in ("truncated", "prompt_cut") if induced[name])
        stage, reason = self._fate(pair, verdict, answer)
        if reason:
            return label, stage, reason, None, score, None, None, None, None, None, None
        said = write_history(pair.before)
        key = text_id(normalise(pair.instruction or ""), normalise(pair.rejected or ""), *filter(None, [said]))
        tokens = {stage: record["tokens"] for stage, record in records.items()}
        provenance: dict[str, Any] = {"response_id": pair.id, "source": pair.provenance["source"], "tokens": tokens}
        provenance["verdict"] = {"reason": verdict["reason"], "label": verdict["label"]}
        if SCORE in records:
            provenance |= {"round_trip": score, "candidate_scores": pair.provenance["candidate_scores"]}
        own = json.dumps(provenance, ensure_ascii=False)
        return label, "", "", key, score, pair.id, said, pair.instruction, pair.rejected, answer["chosen"], own

    def _fate(self, pair: Example, verdict: Record, answer: Record) -> tuple[str, str]:
        """Return (stage, reason) of a drop; ("", "") for a pair that may enter the dataset."""
        if not verdict["keep"]:
            return FILTER, verdict["reason"]
        if answer["chosen"] is None:
            return RESPOND, answer["reason"]
        texts = pair.instruction or "", pair.rejected or "", answer["chosen"]
        if self._rejections.rejects(pair.id, *texts, pair.before):
            return MERGE, "rejected_by_people"
        if reason := self._guard.reason_of(pair):
            return MERGE, reason
        if normalise(answer["chosen"]) == normalise(pair.rejected or ""):
            return MERGE, "chosen_equals_rejected"
        return "", ""

    def mark_repeated_pairs(self, threshold: float | None) -> None:
        """Find the pairs that repeat an earlier one exactly, then those that nearly do."""
        self._scratch.derive("exact", _REPEATED_PAIRS)
        self._scratch.derive("fates_so_far", _FATES.format(repeated="exact"), order="n")
        rows = self._scratch.rows("pairs", ["n", "instruction", "rejected", "history"])
        pairs = (
            (n, Example("", instruction, rejected=rejected, **read_history(said)))
            for n, instruction, rejected, said in compress(rows, self._kept("fates_so_far"))
        )
        find_near_duplicates(pairs, threshold, self._scratch)
        self._scratch.derive("near", "SELECT n, 'near_duplicate_pair' AS reason FROM near_duplicates")
        self._scratch.derive("repeated", "FROM exact UNION ALL FROM near")
        self._scratch.derive("fates", _FATES.format(repeated="repeated"), order="n")

    def _kept(self, fates: str) -> Iterator[bool]:
        """Yield, for each pair in order, whether nothing has dropped it."""
        return (reason == "" for (reason,) in self._scratch.rows(fates, ["reason"]))

    def count(self) -> None:
        """Count the drops by label, stage and reason, and the round-trip scores."""
        fates = "SELECT label, stage, reason, count(*) FROM fates GROUP BY ALL ORDER BY ALL"
        self.merged.fates = {(label, *fate): number for label, *fate, number in self._scratch.query(fates)}
        bins = """SELECT CAST(floor(score * 10) AS INTEGER) AS bin, count(*), count(*) FILTER (reason = '')
            FROM fates WHERE score IS NOT NULL GROUP BY bin ORDER BY bin"""
        self.merged.scores = {bin: counts for bin, *counts in self._scratch.query(bins)}

    def dataset(self) -> Iterator[pyarrow.RecordBatch]:
        """Yield the rows of the dataset in the order of the corpus."""
        shared = ", " + json.dumps(provenance_of_all(self.merged.ledgers), ensure_ascii=False)[1:]
        kept, columns = self._kept("fates"), self.merged.schema.names
        for batch in self._scratch.batches("pairs", columns):
            batch = batch.filter(pyarrow.array(list(islice(kept, batch.num_rows))))
            whole = [own[:-1] + shared for own in batch.column("provenance").to_pylist()]
            yield batch.set_column(columns.index("provenance"), "provenance", pyarrow.array(whole, TEXT))
