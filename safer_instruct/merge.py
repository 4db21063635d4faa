"""All shards' ledgers -> one dataset, in the order of the corpus, whatever the number of shards.

The dataset is a function of corpus, ledgers and `exclude` alone: nothing in it tells how many shards there were.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from config.errors import UserError
from config.paths import find_path
from safer_instruct.corpus import Corpus
from safer_instruct.examples import Example, normalise, read_rows, require_columns, text_id
from safer_instruct.ledger import Record, read_ledger, shard_count, shard_path
from safer_instruct.stages import FILTER, INDUCE, RESPOND, STAGES, kept, require_records, with_instructions

MERGE = "merge"
COLUMNS = ("id", "instruction", "rejected", "chosen", "label", "provenance")
PARQUET_ROWS = 4096


@dataclass(frozen=True)
class StageResults:
    """The records of one stage from all shards, and the configuration that all of them were made with."""

    configuration: dict[str, Any]
    records: dict[str, Record]


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


def read_results(folder: Path) -> dict[str, StageResults]:
    """Read the ledgers of all stages and shards.

    Raises:
        UserError: A ledger is missing, or the shards of a stage were made with different configurations.
    """
    count = shard_count(folder)
    if count is None:
        raise UserError(f"{folder}: no ledgers to merge; run stage=induce, filter and respond first, or stage=all")
    return {stage: _read_stage(folder, stage, count) for stage in STAGES}


def _read_stage(folder: Path, stage: str, count: int) -> StageResults:
    paths = [shard_path(folder, stage, index, count) for index in range(count)]
    missing = [str(index) for index, path in enumerate(paths) if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {count} shards have no ledger of stage={stage} (first missing: "
            f"{', '.join(missing[:10])}); run them, each with shard.index=I shard.count={count}, before stage=merge"
        )
    results = StageResults(*read_ledger(paths[0]))
    for path in paths[1:]:
        configuration, records = read_ledger(path)
        if configuration != results.configuration:
            keys = sorted({*configuration, *results.configuration})
            differing = [key for key in keys if configuration.get(key) != results.configuration.get(key)]
            raise UserError(
                f"{path}: made with another configuration than shard 0 ({', '.join(differing)}); delete the ledgers of "
                "the wrong shards and run these again"
            )
        results.records.update(records)
    return results


def merge(
    corpus: Corpus, results: Mapping[str, StageResults], output: Path, *, exclude: str | None, format: str
) -> Funnel:
    """Write `si.jsonl` or `si.parquet`; the file appears as a whole or not at all.

    Args:
        corpus: The whole corpus.
        results: Of `read_results`.
        output: The dataset folder.
        exclude: A file with a column `instruction`: pairs with one of these instructions (case and whitespace aside)
            are kept out.
        format: "jsonl" or "parquet".

    Returns:
        The counts.

    Raises:
        UserError: Rows that a stage has not finished, or a corpus that has changed.
    """
    excluded = read_instructions(exclude) if exclude else set()
    funnel = Funnel()
    pairs = with_instructions(corpus.examples, results[INDUCE].records)
    require_records(kept(pairs, results[FILTER].records), results[RESPOND].records, RESPOND)
    provenance = provenance_of_all(results)
    rows = _rows(pairs, results, excluded, provenance, funnel)
    write = {"jsonl": _write_jsonl, "parquet": _write_parquet}[format]
    path = output / f"si.{format}"
    partial = output / f".si.{format}.partial"
    write(partial, rows)
    os.replace(partial, path)
    for other in {"jsonl", "parquet"} - {format}:  # a reader of the folder must not find an older dataset
        (output / f"si.{other}").unlink(missing_ok=True)
    return funnel


def read_instructions(path: str) -> set[str]:
    """Return the normalised instructions of a file with a column `instruction`."""
    instructions = set()
    for where, row in read_rows(find_path(path)):
        require_columns(row, ["instruction"], where)
        instructions.add(normalise(str(row["instruction"] or "")))
    return instructions


def provenance_of_all(results: Mapping[str, StageResults]) -> dict[str, Any]:
    """Return the part of the provenance that all rows share."""
    induced, screened, answered = (results[stage].configuration for stage in STAGES)
    return {
        "reversed_model": induced["model"],
        "reversed_model_fingerprint": induced["model_fingerprint"],
        "reversed_prompt": induced["prompt"],
        "temperature": induced["generation.temperature"],
        "top_p": induced["generation.top_p"],
        "max_new_tokens": induced["generation.max_new_tokens"],
        "seed": induced["generation.seed"],
        "filter_expert": screened["expert"],
        "filter_expert_fingerprint": screened["expert_fingerprint"],
        "respond_expert": answered["expert"],
        "respond_expert_fingerprint": answered["expert_fingerprint"],
    }


def _rows(
    pairs: list[Example],
    results: Mapping[str, StageResults],
    excluded: set[str],
    shared: dict[str, Any],
    funnel: Funnel,
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for pair in pairs:
        verdict = results[FILTER].records[pair.id]
        answer = results[RESPOND].records.get(pair.id, {}) if verdict["keep"] else {}
        label = pair.label or verdict["label"]
        funnel.entered[label] += 1
        stage, reason = _fate(pair, verdict, answer, excluded, seen)
        if reason:
            funnel.dropped[label, stage, reason] += 1
            continue
        yield {
            "id": pair.id,
            "instruction": pair.instruction,
            "rejected": pair.rejected,
            "chosen": answer["chosen"],
            "label": label,
            "provenance": {"response_id": pair.id, "source": pair.provenance["source"], **shared},
        }


def _fate(pair: Example, verdict: Record, answer: Record, excluded: set[str], seen: set[str]) -> tuple[str, str]:
    """Return (stage, reason) of a drop, ("", "") for a pair that enters the dataset."""
    if not verdict["keep"]:
        return FILTER, verdict["reason"]
    if answer["chosen"] is None:
        return RESPOND, answer["reason"]
    instruction, rejected = normalise(pair.instruction or ""), normalise(pair.rejected or "")
    if instruction in excluded:
        return MERGE, "excluded_instruction"
    if normalise(answer["chosen"]) == rejected:
        return MERGE, "chosen_equals_rejected"
    key = text_id(instruction, rejected)
    if key in seen:
        return MERGE, "duplicate_pair"
    seen.add(key)
    return "", ""


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write the same columns; `provenance` is a JSON string, so that its fields may differ between datasets."""
    schema = pyarrow.schema([(column, pyarrow.string()) for column in COLUMNS])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while batch := list(islice(rows, PARQUET_ROWS)):
            flat = [{**row, "provenance": json.dumps(row["provenance"], ensure_ascii=False)} for row in batch]
            writer.write_table(pyarrow.Table.from_pylist(flat, schema=schema))
