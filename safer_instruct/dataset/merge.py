"""All shards' ledgers -> one dataset, in the order of the corpus, whatever the number of shards.

The dataset is a function of corpus, ledgers and the rules below alone: nothing in it tells how many shards there were.
Corpus and ledgers are joined on the disk, bucket by bucket (`spool.Spool`), so memory does not grow with them: what is
kept of each row is one byte, and the near-duplicate index where that is switched on.
"""

from __future__ import annotations

import heapq
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.errors import UserError
from config.paths import find_path
from config.settings import CorpusSettings, DuplicatesSettings
from safer_instruct.dataset.files import write_dataset
from safer_instruct.dataset.similarity import LeakageGuard, NearDuplicates
from safer_instruct.dataset.spool import Spool, num_buckets
from safer_instruct.induction.ledger import Record, count_lines
from safer_instruct.induction.ledgers import StageLedgers
from safer_instruct.induction.stages import (
    FILTER,
    INDUCE,
    REQUIRED_STAGES,
    RESPOND,
    SCORE,
    STAGES,
    require_same_instruction,
    with_instruction,
    with_score,
)
from safer_instruct.text.corpus import MAX_PLACES, CorpusRows, Dropped, repetition
from safer_instruct.text.examples import Example, normalise, text_id
from safer_instruct.text.readers import read_rows, require_columns

MERGE = "merge"
SCRATCH = ".merge"  # folder inside the output
# What is kept of each row of the corpus, one byte: 0, or which repetition it is.
DUPLICATE_ID, DUPLICATE_RESPONSE, DUPLICATE_PAIR, NEAR_DUPLICATE = 1, 2, 3, 4


@dataclass
class Funnel:
    """How many rows of each label entered, and where and why the others were dropped."""

    entered: Counter[str] = field(default_factory=Counter)
    dropped: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # (label, stage, reason)

    def num_dropped(self, *, label: str | None = None, stage: str | None = None) -> Counter[str]:
        """Return reason -> rows dropped, of one label or stage or all."""
        reasons: Counter[str] = Counter()
        for (of_label, of_stage, reason), number in sorted(self.dropped.items()):
            if label in (None, of_label) and stage in (None, of_stage):
                reasons[reason] += number
        return reasons


@dataclass
class Merged:
    """What a merge found: everything that report and card tell.

    Attributes:
        ledgers: By stage.
        corpus_rows: Rows of the corpus, usable or not.
        corpus_dropped: Of them, those that are no part of it.
        funnel: The others.
        induced: truncated, prompt_cut -> rows.
        tokens: Stage -> tokens used.
        cost: Stage -> cost.
        scores: Round-trip scores in bins of 0.1: lower edge x 10 -> (rows scored, of them in the dataset).
        num_rows: Rows of the dataset.
    """

    ledgers: Mapping[str, StageLedgers]
    corpus_rows: int = 0
    corpus_dropped: Dropped = field(default_factory=Dropped)
    funnel: Funnel = field(default_factory=Funnel)
    induced: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    cost: Counter[str] = field(default_factory=Counter)
    scores: dict[int, list[int]] = field(default_factory=dict)
    num_rows: int = 0


def merge(
    corpus: CorpusSettings,
    ledgers: Mapping[str, StageLedgers],
    output: Path,
    *,
    guard: LeakageGuard,
    duplicates: DuplicatesSettings,
    format: str,
) -> Merged:
    """Write the dataset; its files appear as a whole or not at all.

    Args:
        corpus: Where the whole corpus lies.
        ledgers: Of `find_ledgers`.
        output: The dataset folder.
        guard: Instructions that are kept out.
        duplicates: Which near repetitions go.
        format: Key of `dataset_files.FILES`.

    Raises:
        UserError: Rows that a stage has not finished, or a corpus that has changed or cannot be read to its end.
    """
    with _scratch(output) as folder:
        job = _Merge(corpus, ledgers, guard, folder)
        job.spool_ledgers()
        job.spool_corpus()
        job.join()
        job.mark_repeated_pairs()
        if duplicates.threshold is not None:
            index = folder / "index" if duplicates.index == "disk" else None
            job.mark_near_duplicates(duplicates.threshold, index)
        job.merged.num_rows = write_dataset(output, format, job.rows())
        return job.merged


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    folder = output / SCRATCH
    shutil.rmtree(folder, ignore_errors=True)  # of a merge that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Merge:
    """The steps of `merge`, in the order in which it calls them. `n` numbers the usable rows of the corpus."""

    def __init__(
        self, corpus: CorpusSettings, ledgers: Mapping[str, StageLedgers], guard: LeakageGuard, folder: Path
    ) -> None:
        self.merged = Merged(ledgers)
        self._settings = corpus
        self._guard = guard
        self._folder = folder
        self._shared = provenance_of_all(ledgers)
        self._marks = bytearray()
        self._count = 1
        self._records: dict[str, Spool] = {}
        self._corpus: Spool
        self._pairs: Spool

    def spool_ledgers(self) -> None:
        """Put the records of all stages into buckets by row id."""
        self._count = num_buckets(sum(count_lines(path) for path in self.merged.ledgers[INDUCE].paths))
        for stage, ledgers in self.merged.ledgers.items():
            spool = self._records[stage] = Spool(self._folder, stage, self._count)
            for record, line in ledgers.records():
                spool.add(record["id"], line)
                self.merged.tokens[stage] += record["tokens"]
                self.merged.cost[stage] += record.get("cost", 0.0)

    def spool_corpus(self) -> None:
        """Put the rows of the corpus into the same buckets, and find the repeated ones."""
        self._corpus = Spool(self._folder, "corpus", self._count)
        self._pairs = Spool(self._folder, "pairs", self._count)
        rows = CorpusRows(self._settings)
        num_rows = 0
        for example in rows:
            row = [num_rows, example.id, example.rejected, example.label, example.provenance["source"]]
            self._corpus.add(example.id, json.dumps(row).encode() + b"\n")
            num_rows += 1
        if rows.broken:
            raise UserError(f"{rows.broken}. The corpus must be readable to its end before stage=merge")
        self._marks = bytearray(num_rows)
        self.merged.corpus_rows, self.merged.corpus_dropped = rows.num_rows, rows.dropped
        self._mark_repeated_rows()

    def _mark_repeated_rows(self) -> None:
        """Of rows with one id the first stays; of these, of rows with one response the first."""
        texts = Spool(self._folder, "texts", self._count)
        by_id, by_text = repetition(self._settings, same_id=True), repetition(self._settings, same_id=False)
        counts: Counter[str] = Counter()
        first_places: list[tuple[int, str, str]] = []

        def repeated(n: int, mark: int, reason: str, source: str) -> None:
            self._marks[n] = mark
            counts[reason] += 1
            heapq.heappush(first_places, (-n, reason, source))
            if len(first_places) > 4 * MAX_PLACES:
                heapq.heappop(first_places)  # the last of them

        for bucket in range(self._count):
            seen: set[str] = set()
            for n, id, response, _, source in map(json.loads, self._corpus.read(bucket)):
                if id in seen:
                    repeated(n, DUPLICATE_ID, by_id, source)
                    continue
                seen.add(id)
                if self._settings.id_column:  # else the id is the text's
                    key = text_id(response)
                    texts.add(key, json.dumps([key, n, source]).encode() + b"\n")
        for bucket in range(self._count if self._settings.id_column else 0):
            first: set[str] = set()
            for key, n, source in sorted(map(json.loads, texts.read(bucket)), key=lambda row: row[1]):
                if key in first:
                    repeated(n, DUPLICATE_RESPONSE, by_text, source)
                first.add(key)
        for _, reason, source in sorted(first_places, reverse=True):
            self.merged.corpus_dropped.count(reason, source)
        self.merged.corpus_dropped.counts |= counts

    def join(self) -> None:
        """Bring rows and records together, drop what the stages dropped, and write a run of the others per bucket."""
        missing: Counter[str] = Counter()
        num_rows = 0
        for bucket in range(self._count):
            records = {stage: self._load_records(stage, bucket) for stage in self.merged.ledgers}
            with self._run(bucket).open("w", encoding="utf-8") as run:
                for n, id, response, label, source in map(json.loads, self._corpus.read(bucket)):
                    if self._marks[n]:
                        continue
                    num_rows += 1
                    of_row = {stage: found[id] for stage, found in records.items() if id in found}
                    if absent := self._absent(of_row):
                        missing[absent] += 1
                        continue
                    example = Example(id, rejected=response, label=label, provenance={"source": source})
                    if row := self._join_row(n, example, of_row):
                        run.write(f"{n}\t{json.dumps(row, ensure_ascii=False)}\n")
        for stage in (stage for stage in STAGES if missing[stage]):
            raise UserError(
                f"{missing[stage]} of {num_rows} rows have no result of stage={stage} yet; run it to its end first "
                f"(the same command with stage={stage}): it goes on where it stopped"
            )

    def _absent(self, records: Mapping[str, Record]) -> str:
        """The first stage that the row still needs, "" if it needs none."""
        needed = [stage for stage in self.merged.ledgers if stage != RESPOND]
        if FILTER in records and records[FILTER]["keep"]:
            needed.append(RESPOND)
        return next((stage for stage in needed if stage not in records), "")

    def _load_records(self, stage: str, bucket: int) -> dict[str, Record]:
        records: dict[str, Record] = {}
        for record in map(json.loads, self._records[stage].read(bucket)):
            records.setdefault(record["id"], record)
        return records

    def _join_row(self, n: int, example: Example, records: Mapping[str, Record]) -> dict[str, Any] | None:
        """The dataset's row, None if a stage dropped it; counts it either way."""
        induced, verdict, answer = records[INDUCE], records[FILTER], records.get(RESPOND, {})
        pair = with_instruction(example, induced)
        if SCORE in records:
            pair = with_score(pair, records[SCORE])
        for stage in (FILTER, RESPOND):
            require_same_instruction(pair, records.get(stage, {}), stage)
        label = pair.label or verdict["label"]
        self.merged.funnel.entered[label] += 1
        self.merged.induced.update(name for name in ("truncated", "prompt_cut") if induced[name])
        score = pair.provenance.get("round_trip")
        if score is not None:
            self.merged.scores.setdefault(int(score * 10 // 1), [0, 0])[0] += 1
        stage, reason = self._fate(pair, verdict, answer)
        if reason:
            self.merged.funnel.dropped[label, stage, reason] += 1
            return None
        key = text_id(normalise(pair.instruction or ""), normalise(pair.rejected or ""))
        self._pairs.add(key, f"{key} {n}\n".encode())
        tokens = {stage: record["tokens"] for stage, record in records.items()}
        own: dict[str, Any] = {"response_id": pair.id, "source": pair.provenance["source"], "tokens": tokens}
        own["verdict"] = {"reason": verdict["reason"], "label": verdict["label"]}
        if SCORE in records:
            own |= {"round_trip": score, "candidate_scores": pair.provenance["candidate_scores"]}
        return {
            "id": pair.id,
            "instruction": pair.instruction,
            "rejected": pair.rejected,
            "chosen": answer["chosen"],
            "label": label,
            "provenance": own,
        }

    def _fate(self, pair: Example, verdict: Record, answer: Record) -> tuple[str, str]:
        """Return (stage, reason) of a drop, ("", "") for a pair that may enter the dataset."""
        if not verdict["keep"]:
            return FILTER, verdict["reason"]
        if answer["chosen"] is None:
            return RESPOND, answer["reason"]
        if reason := self._guard.reason(normalise(pair.instruction or "")):
            return MERGE, reason
        if normalise(answer["chosen"]) == normalise(pair.rejected or ""):
            return MERGE, "chosen_equals_rejected"
        return "", ""

    def mark_repeated_pairs(self) -> None:
        """Of pairs that are the same, case and whitespace aside, the first stays."""
        for bucket in range(self._count):
            seen: set[bytes] = set()
            for line in sorted(self._pairs.read(bucket), key=lambda line: int(line.split()[1])):
                key, n = line.split()
                if key in seen:
                    self._marks[int(n)] = DUPLICATE_PAIR
                seen.add(key)

    def mark_near_duplicates(self, threshold: float, index: Path | None) -> None:
        """Of pairs that are nearly the same, the first stays."""
        if index is not None:
            index.mkdir()
        near = NearDuplicates(threshold, index)
        numbers = []
        for n, row in self._joined():
            if not self._marks[n]:
                numbers.append(n)
                near.add(f"{row['instruction']}\n{row['rejected']}")
        for n, is_duplicate in zip(numbers, near.duplicates(), strict=True):
            if is_duplicate:
                self._marks[n] = NEAR_DUPLICATE

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the dataset in the order of the corpus; counts the repetitions."""
        reasons = {DUPLICATE_PAIR: "duplicate_pair", NEAR_DUPLICATE: "near_duplicate_pair"}
        for n, row in self._joined():
            if self._marks[n]:
                self.merged.funnel.dropped[row["label"], MERGE, reasons[self._marks[n]]] += 1
                continue
            own = row["provenance"]
            if own.get("round_trip") is not None:
                self.merged.scores[int(own["round_trip"] * 10 // 1)][1] += 1
            row["provenance"] = {**own, **self._shared}
            yield row

    def _joined(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the runs of all buckets as one, by n: each is sorted, as the corpus was when it was spooled."""
        files = [self._run(bucket).open(encoding="utf-8", newline="\n") for bucket in range(self._count)]
        try:
            for n, text in heapq.merge(*(map(_split, file) for file in files)):
                yield n, json.loads(text)
        finally:
            for file in files:
                file.close()

    def _run(self, bucket: int) -> Path:
        return self._folder / f"run-{bucket:03d}"


def _split(line: str) -> tuple[int, str]:
    number, _, text = line.partition("\t")
    return int(number), text


def read_instructions(path: str) -> set[str]:
    """Return the normalised instructions of a file with a column `instruction`."""
    instructions = set()
    for where, row in read_rows(find_path(path)):
        require_columns(row, ["instruction"], where)
        instructions.add(normalise(str(row["instruction"] or "")))
    return instructions


def provenance_of_all(ledgers: Mapping[str, StageLedgers]) -> dict[str, Any]:
    """Return the part of the provenance that all rows share."""
    induced, screened, answered = (ledgers[stage].configuration for stage in REQUIRED_STAGES)
    shared = {
        "reversed_model": induced["model"],
        "reversed_model_fingerprint": induced["model_fingerprint"],
        "reversed_prompt": induced["prompt"],
        "temperature": induced["generation.temperature"],
        "top_p": induced["generation.top_p"],
        "max_new_tokens": induced["generation.max_new_tokens"],
        "seed": induced["generation.seed"],
        "num_candidates": induced.get("generation.num_candidates", 1),
        "filter_expert": screened["expert"],
        "filter_expert_fingerprint": screened["expert_fingerprint"],
        "filter_prompt": screened["expert_prompt"],
        "respond_expert": answered["expert"],
        "respond_expert_fingerprint": answered["expert_fingerprint"],
        "respond_prompt": answered["expert_prompt"],
    }
    if SCORE in ledgers:
        scored = ledgers[SCORE].configuration
        shared |= {
            "forward_model": scored["forward_model"],
            "forward_fingerprint": scored["forward_fingerprint"],
            "min_round_trip": screened.get("roundtrip.min_score"),
        }
    return shared
