"""Datasets: from text files to stores of token rows, counting every row that is dropped or truncated.

The bridge between `safer_instruct.text`, which reads and renders text (the schemas' parsers are in `text/schemas.py`),
and `trainers/`, which only sees tokens. `build_stores` encodes the rows of all datasets and caches the result, so a
second run tokenises nothing. Reports identify rows by id and location (file:line), never by their text.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from config.checksums import hash_files
from config.errors import UserError
from config.pair_losses import Rows
from config.paths import find_path
from config.settings import DatasetSettings
from safer_instruct.text.chat import special_token_texts
from safer_instruct.text.encoding import EncodedRow, Encoder, prompt_token_ids, tokenizer_fingerprint
from safer_instruct.text.example_encoder import ExampleEncoder, Targets
from safer_instruct.text.examples import Example, held_out, text_id
from safer_instruct.text.exclusion import exclude_file, key_hash, read_instruction_keys, turn_keys
from safer_instruct.text.formats import data_suffix
from safer_instruct.text.hub import source_of
from safer_instruct.text.loading import LoadedExamples, load_examples
from safer_instruct.text.readers import data_files
from safer_instruct.text.refusals import declines
from safer_instruct.text.row_log import RowLog, describe, few_answered
from trainers.data.cache import build_once
from trainers.data.mixture import mixture
from trainers.data.token_store import TokenStore, TokenStoreWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LoadedExamples", "TrainEval", "build_stores", "describe", "load_examples", "prompt_token_ids"]

Loss = Literal["likelihood", "reverse", "preference", "answers"]
# The rows that a loss trains on -> how they are encoded.
ENCODED_FOR: dict[Rows, Loss] = {
    "responses": "likelihood", "reversed": "reverse", "pairs": "preference", "answers": "answers",
}  # fmt: skip
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class TrainEval:
    """The two stores of a run, and a report of what happened to the rows (see `describe`)."""

    train: TokenStore
    eval: TokenStore
    report: dict[str, Any]


def build_stores(
    datasets: Mapping[str, DatasetSettings],
    *,
    loss: Loss,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    cache_dir: Path,
    n_eval_examples: int | None = None,
    batch_size: int = 1,
    all_answers: bool = False,
) -> TrainEval:
    """Encode the datasets, concatenated in order, or load them from the cache; `eval` may have no rows.

    Args:
        datasets: Settings by name.
        loss: likelihood (prompt -> chosen), reverse (chosen -> instruction), preference (chosen over rejected), or
            answers (prompt -> one response, which is good or bad).
        tokenizer: A fast tokenizer.
        max_length: Maximum tokens of prompt + response; the end of a longer response is cut.
        max_prompt_length: Maximum tokens of the prompt; the end of a longer prompt's body is cut.
        cache_dir: Shared by all runs; entries are keyed by content, so stale ones are never read.
        n_eval_examples: Evaluate on a fixed random subset of this many held-out rows; None for all.
        batch_size: A training split with fewer rows gets a note in the report.
        all_answers: Train on every answer of a conversation, not only the last; with loss=reverse, on every user turn.

    Raises:
        UserError: The files cannot be used, or no row is usable for training (with the counts).
    """
    encoder = Encoder(tokenizer, max_length=max_length, max_prompt_length=max_prompt_length)
    if not datasets:
        raise UserError("datasets=[]: name at least one dataset")
    key = _content_key(datasets, f"{loss}{'-all' * all_answers}", tokenizer, (max_length, max_prompt_length))

    targets = Targets(loss, tokenizer, encoder, all_answers)
    entry = build_once(cache_dir / "tokens", key, lambda directory: _write_stores(directory, key, datasets, targets))
    train, held = TokenStore(entry / "train"), TokenStore(entry / "eval")
    report: dict[str, Any] = dict(train.meta["report"])
    if any(settings.weight is not None for settings in datasets.values()):
        train = _mixed(train, datasets, report)
    if n_eval_examples is not None and n_eval_examples < len(held):
        order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
        held = held.select(order[:n_eval_examples].sort().values)
    notes = [*(few_answered(report) if loss != "reverse" else []), *_size_notes(train, held, datasets, batch_size)]
    report |= {"num_train": len(train), "num_eval": len(held), "notes": notes}
    # Not part of the cached report: files with the same contents may have other names now.
    sources = {name: source_of(name, settings) for name, settings in datasets.items()}
    report["files"] = {
        name: {"read": source.read, "left_out": source.left_out, "others": source.others}
        for name, source in sources.items()
    }
    return TrainEval(train, held, report)


def _size_notes(
    train: TokenStore, held: TokenStore, datasets: Mapping[str, DatasetSettings], batch_size: int
) -> Iterator[str]:
    if len(train) < batch_size:
        yield f"the training split has {len(train)} rows, fewer than batch_size={batch_size}: one batch per epoch"
    if not len(held):
        name, settings = next(iter(datasets.items()))
        yield (
            f"no row is held out (datasets.{name}.eval_fraction={settings.eval_fraction:g}, {len(train)} rows): there "
            f"is nothing to evaluate on; a larger eval_fraction, or datasets.{name}.eval_path=FILE, changes that"
        )


def _mixed(train: TokenStore, datasets: Mapping[str, DatasetSettings], report: dict[str, Any]) -> TokenStore:
    """Return the rows selected by the datasets' weights, and add their counts to the report."""
    num_rows = {name: counts["train"] for name, counts in report["datasets"].items()}
    for name in (name for name, number in num_rows.items() if not number and datasets[name].weight is not None):
        raise UserError(f"datasets.{name}.weight={datasets[name].weight}: it has no usable row:\n{describe(report)}")
    chosen = mixture(num_rows, {name: settings.weight for name, settings in datasets.items()})
    starts = accumulate(num_rows.values(), initial=0)  # the store holds the datasets' rows one after another
    report["mixture"] = {name: len(rows) for name, rows in chosen.items()}
    return train.select(torch.cat([rows + start for rows, start in zip(chosen.values(), starts, strict=False)]))


def _content_key(
    datasets: Mapping[str, DatasetSettings],
    targets: str,
    tokenizer: PreTrainedTokenizerBase,
    limits: tuple[int, int],
) -> str:
    """Hash everything the stores depend on: file contents (not paths), settings, tokenizer, and code.

    The key only finds a cache entry. A resumed run checks `TokenStore.content` instead: editing a comment in the code
    changes the key, but not the content.
    """
    root = Path(__file__).parent
    code = [Path(__file__), root / "trainers" / "data" / "token_store.py"]
    code += sorted((root / "safer_instruct" / "text").glob("*.py"))
    contents: dict[str, Any] = {}
    for name, settings in datasets.items():
        source = source_of(name, settings)
        beside = {"exclude": exclude_file(settings), "eval": settings.eval_path}
        files = {what: data_files(find_path(path)) for what, path in beside.items() if path is not None}
        files["data"] = source.files
        hashes = {what: [hash_files(found), *(data_suffix(file) for file in found)] for what, found in files.items()}
        ignored: dict[str, Any] = {"path": "", "exclude": None, "eval_path": None, "weight": None, "streaming": False}
        contents[name] = [vars(replace(settings, **ignored)), hashes, source.version]
    record = [list(contents.items()), targets, limits, tokenizer_fingerprint(tokenizer), hash_files(code)]
    return xxhash.xxh3_128_hexdigest(json.dumps(record, sort_keys=True).encode())


def _write_stores(directory: Path, key: str, datasets: Mapping[str, DatasetSettings], targets: Targets) -> None:
    """Fill a cache entry: train/, eval/ and rows.jsonl (the rows dropped, cut or noted)."""
    segments = 3 if targets.loss == "preference" else 2
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(TokenStoreWriter(directory / split, key=f"{key}-{split}", num_segments=segments))
            for split in ("train", "eval")
        }
        events = stack.enter_context((directory / "rows.jsonl").open("w"))
        # Evaluation files are read first: no dataset may train on an instruction in another one's evaluation file.
        in_eval_files: set[int] = set()
        parts = {
            name: _DatasetWriter(
                settings, targets, RowLog(name, settings.on_bad_row, events=events), writers, in_eval_files
            )
            for name, settings in datasets.items()
        }
        for part in parts.values():
            part.write_eval_file()
        reports = {name: part.write() for name, part in parts.items()}
        report = {"loss": targets.loss, "datasets": reports}
        if not writers["train"].num_rows:
            held = f", all {writers['eval'].num_rows} usable rows are held out" if writers["eval"].num_rows else ""
            first = "".join(f"\n  first: {why}" for part in parts.values() for why in part.log.why.values())
            raise UserError(f"no usable row to train on{held}; what became of the rows:\n{describe(report)}{first}")
        for writer in writers.values():
            writer.finish({"report": report})


class _DatasetWriter:
    """Encodes one dataset into the two stores."""

    def __init__(
        self, settings: DatasetSettings, targets: Targets, log: RowLog, writers: Mapping[str, TokenStoreWriter],
        in_eval_files: set[int],
    ) -> None:  # fmt: skip
        self._settings, self._loss, self.log, self._writers = settings, targets.loss, log, writers
        self._pairs = self._loss == "preference" or (self._loss == "answers" and settings.split_pairs)
        self._special = special_token_texts(targets.tokenizer)
        self._rows = ExampleEncoder(settings, targets, log)
        self._exclude_file = exclude_file(settings)
        self._excluded = set(map(key_hash, read_instruction_keys(self._exclude_file)))
        self._in_eval_files = in_eval_files  # shared by all datasets of the run
        self._targets = array("Q")
        self._answered = 0  # rows whose chosen response does not decline

    def write_eval_file(self) -> None:
        """Encode the rows of `eval_path`, if the dataset has one."""
        settings = self._settings
        if settings.eval_path is not None:
            self._encode(self._load(settings.eval_path, training=False), "eval")

    def write(self) -> dict[str, Any]:
        """Encode the rows of `path`, and return the dataset's part of the report."""
        settings, log = self._settings, self.log
        self._encode(self._load(settings.path), None)
        values, counts = np.unique(np.frombuffer(self._targets, np.uint64), return_counts=True)
        return {
            "read": log.read,
            "train": log.counts.pop("train", 0),
            "eval": log.counts.pop("eval", 0),
            "dropped": dict(log.dropped),
            "noted": dict(+log.counts),
            "unread_columns": dict(log.unread),
            "excluded_by": None if self._exclude_file is None else self._exclude_file.name,
            "different_targets": len(values),
            "most_common_target": int(counts.max(initial=0)),
            "answered": self._answered,
            "ids": log.ids,
        }

    def _load(self, path: str, *, training: bool = True) -> LoadedExamples:
        single = self._loss == "answers" and not self._pairs
        return LoadedExamples(self._settings, path, self.log, pairs=self._pairs, training=training, single=single)

    def _encode(self, loaded: LoadedExamples, split: str | None) -> None:
        """Encode a file's rows in batches; with `split` None, split by a hash of the instruction, up to max_rows."""
        examples = iter(self._usable(loaded, split))
        left = math.inf if split is not None or self._settings.max_rows is None else self._settings.max_rows
        with tqdm(desc=f"encoding {self.log.name}", unit=" rows", disable=None) as bar:
            while chunk := list(islice(examples, int(min(left, ROWS_AT_ONCE)))):
                for example, target, rows in self._rows.encode(chunk):
                    for number, row in enumerate(rows):
                        id = example.id if not number else text_id(example.id, str(number))
                        self._append(example, id, row, split or self._split(example))
                    self._targets.append(xxhash.xxh3_64_intdigest(target.encode()))
                    left -= 1
                bar.update(len(chunk))

    def _usable(self, loaded: Iterable[Example], split: str | None) -> Iterator[Example]:
        for example in loaded:
            asked = [key_hash(key) for key in turn_keys(example)]
            rejected = example.rejected if self._loss in ("preference", "answers") else None
            texts = [example.instruction, example.input, example.chosen, rejected]
            texts += [example.system, *(turn.content for turn in example.history)]
            if not self._excluded.isdisjoint(asked):
                self.log.drop_example("excluded", example)
            elif split is None and asked[0] in self._in_eval_files:
                self.log.drop_example("in_eval_file", example)
            elif any(token in text for text in texts if text for token in self._special):
                self.log.drop_example("special_token", example)
            else:
                if split is not None:
                    self._in_eval_files.add(asked[0])
                yield example

    def _split(self, example: Example) -> str:
        if self._settings.eval_path is not None:
            return "train"
        return "eval" if held_out(example.user_turns[0][0], self._settings.eval_fraction) else "train"

    def _append(self, example: Example, id: str, row: EncodedRow, split: str) -> None:
        if self._loss == "answers":  # of a pair, chosen comes first
            for number, response in enumerate(row.responses):
                is_good = example.chosen is not None and number == 0
                self._writers[split].append(id, (row.prompt, response), is_good=is_good)
        else:
            self._writers[split].append(id, (row.prompt, *row.responses))
        self.log.counts[split] += 1
        self._answered += not declines(str(example.chosen))
        if row.prompt_cut:
            self.log.note("prompt_cut", example)
        names = ("chosen_cut", "rejected_cut") if len(row.responses) == 2 else ("response_cut",)
        for name, cut in zip(names, row.responses_cut, strict=True):
            if cut:
                self.log.note(name, example)
        if (example.chosen or "").startswith(str(example.instruction)):
            self.log.note("chosen_begins_with_its_instruction", example)
        if row.straddled:
            self.log.note("boundary_merge", example)
