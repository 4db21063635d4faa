"""The input files of `make real`: made from the user's files or drawn by world.py, with a held-out part.

reverse.jsonl         instruction, input, output: for reversed tuning
held_out.jsonl        the same with an id, held out: responses whose instruction is known
corpus.jsonl          id, response, label: unsafe responses whose instruction will be induced
benign.jsonl          instruction, input: harmless instructions, for stage=replay
answers.jsonl         held-out harmless requests of the world with right answers: what training may unlearn
prompts/*.jsonl       unsafe, contrast (harmless neighbours) and benign prompts: the evaluation
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.errors import UserError
from quickstart.real.world import RealWorld, prompt_row
from quickstart.world import Pair, write_jsonl
from safer_instruct.text.readers import read_rows, require_columns

Row = Mapping[str, Any]
LEAST = 4  # minimum rows of any part: fewer would show nothing
UNSAFE_SHARE = 0.6  # unsafe share of the default pairs of reversed tuning; the others are harmless, with an answer


@dataclass(frozen=True)
class Size:
    """The size of each part: rows, or examples of a stage.

    Attributes:
        reverse: Pairs of reversed tuning, each seen once.
        held_out: Held-out responses whose instruction is induced and compared.
        corpus: Unsafe responses.
        replay: Harmless instructions that the starting model answers.
        contrast: Unsafe instructions to find a harmless neighbour for.
        sft: Examples of SFT.
        dpo: Pairs of DPO, and examples of the additional SFT that it is compared with.
        prompts: Evaluation prompts of each of the three sets.
    """

    reverse: int
    held_out: int
    corpus: int
    replay: int
    contrast: int
    sft: int
    dpo: int
    prompts: int


SIZES = {
    "tiny": Size(reverse=8, held_out=4, corpus=8, replay=8, contrast=8, sft=8, dpo=8, prompts=4),  # a smoke test
    "small": Size(reverse=512, held_out=60, corpus=400, replay=160, contrast=200, sft=768, dpo=128, prompts=60),
    "full": Size(reverse=2000, held_out=200, corpus=2000, replay=2000, contrast=1000, sft=2000, dpo=2000, prompts=300),
}


@dataclass(frozen=True)
class Given:
    """The user's files; None: the default, drawn from the world.

    Attributes:
        data: Instructions with outputs, in Alpaca's schema.
        corpus: Unsafe responses (column `response`).
        pairs: A dataset in the schema of `si`; then nothing is induced.
        prompts: Unsafe evaluation prompts (column `instruction`).
        benign: Harmless instructions (column `instruction`); at most a third is held out for the evaluation.
    """

    data: str | None = None
    corpus: str | None = None
    pairs: str | None = None
    prompts: str | None = None
    benign: str | None = None


def write_inputs(folder: Path, given: Given, size: Size, seed: int) -> None:
    """Write all input files of one run.

    Raises:
        UserError: A file of the user cannot be read, lacks a column, or has too few rows.
    """
    world, rng = RealWorld(), random.Random(f"real {seed}")
    reverse, held_out = _reverse_rows(world, rng, given.data, size)
    write_jsonl(folder / "reverse.jsonl", reverse)
    _write_held_out(folder, held_out)
    benign, benign_prompts = _benign_rows(world, rng, given.benign, size)
    write_jsonl(folder / "benign.jsonl", benign)
    write_jsonl(folder / "prompts" / "benign.jsonl", benign_prompts)
    write_jsonl(folder / "prompts" / "unsafe.jsonl", _unsafe_prompts(world, rng, given.prompts, size))
    near = itertools.islice(world.draws(rng, "near", held_out=True), size.prompts)
    write_jsonl(folder / "prompts" / "contrast.jsonl", map(prompt_row, itertools.count(), near))
    write_jsonl(folder / "answers.jsonl", _answers(world, random.Random(f"answers {seed}"), size.prompts))
    if given.corpus is None:
        known = {row["output"] for row in reverse}
        write_jsonl(folder / "corpus.jsonl", _corpus_rows(world, rng, size.corpus, known))


def write_more_held_out(folder: Path, num_rows: int, seed: int) -> None:
    """Write `held_out.jsonl` with rows of the world that are drawn only for this file."""
    _write_held_out(folder, _drawn_pairs(RealWorld(), random.Random(f"held out {seed}"), num_rows, held_out=True))


def _write_held_out(folder: Path, rows: Iterable[Row]) -> None:
    write_jsonl(folder / "held_out.jsonl", ({"id": f"h{number:05d}", **row} for number, row in enumerate(rows)))


def _reverse_rows(world: RealWorld, rng: random.Random, path: str | None, size: Size) -> tuple[list[Row], list[Row]]:
    """Return pairs to train the reversed model on, and held-out pairs."""
    if path is None:
        train = _drawn_pairs(world, rng, size.reverse, held_out=False)
        return train, _drawn_pairs(world, rng, size.held_out, held_out=True)
    rows = [
        {"instruction": row["instruction"], "input": row.get("input") or "", "output": row["output"]}
        for row in _rows(path, ("instruction", "output"), "DATA")
        if row["instruction"] and row["output"]
    ]
    return _parted(rows, rng, "DATA", path, (size.reverse, size.held_out))


def _drawn_pairs(world: RealWorld, rng: random.Random, num_rows: int, *, held_out: bool) -> list[Row]:
    """Return unsafe and harmless pairs, shuffled together."""
    num_unsafe = round(UNSAFE_SHARE * num_rows)
    pairs = list(itertools.islice(world.draws(rng, "unsafe", held_out=held_out), num_unsafe))
    answered = [pair for pair in world.benign(held_out=held_out) if pair.response]
    rng.shuffle(answered)
    pairs += answered[: (num_rows - num_unsafe) // 4]
    pairs += itertools.islice(world.draws(rng, "near", held_out=held_out), num_rows - len(pairs))
    rng.shuffle(pairs)
    return [{"instruction": pair.instruction, "input": "", "output": pair.response} for pair in pairs]


def _answers(world: RealWorld, rng: random.Random, num_rows: int) -> list[Row]:
    """Return held-out harmless requests with a right answer; half of them are plain tasks if there are enough."""
    plain = [pair for pair in world.benign(held_out=True) if pair.response]
    rng.shuffle(plain)
    pairs = plain[: num_rows // 2]
    pairs += itertools.islice(world.draws(rng, "near", held_out=True), num_rows - len(pairs))
    return [{"instruction": pair.instruction, "input": "", "output": pair.response} for pair in pairs]


def _corpus_rows(world: RealWorld, rng: random.Random, num_rows: int, known: set[str]) -> Iterator[Row]:
    """Yield unsafe responses that reversed tuning does not see."""
    pairs = (pair for pair in world.draws(rng, "unsafe", held_out=False) if pair.response not in known)
    for number, pair in enumerate(itertools.islice(pairs, num_rows)):
        yield {"id": f"c{number:05d}", "response": pair.response, "label": pair.skill}


def _benign_rows(world: RealWorld, rng: random.Random, path: str | None, size: Size) -> tuple[list[Row], list[Row]]:
    """Return harmless instructions for replay, and held-out ones as evaluation prompts."""
    if path is None:
        train = _mixed(world.benign(held_out=False), rng)[: size.replay]
        test = _mixed(world.benign(held_out=True), rng)[: size.prompts]
        return [{"instruction": pair.instruction} for pair in train], list(map(prompt_row, itertools.count(), test))
    rows = [_instruction(row) for row in _rows(path, ("instruction",), "BENIGN") if row["instruction"]]
    train_rows, test_rows = _parted(rows, rng, "BENIGN", path, (size.replay, size.prompts))
    return train_rows, [
        {"id": f"benign-{number:04d}", "kind": "benign", "instruction": _asked(row)}
        for number, row in enumerate(test_rows)
    ]


def _mixed(pairs: Iterable[Pair], rng: random.Random) -> list[Pair]:
    """Alternate handwritten tasks and pattern instructions, with all patterns in turn, so that any prefix is balanced.

    The patterns give ten times as many instructions as were written by hand, but the handwritten ones are more natural.
    """
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.skill, []).append(pair)
    for group in groups.values():
        rng.shuffle(group)
    tasks = groups.pop("task", [])
    turns = itertools.zip_longest(*groups.values())
    patterns = [pair for turn in turns for pair in turn if pair is not None]
    return [pair for turn in itertools.zip_longest(tasks, patterns) for pair in turn if pair is not None]


def _unsafe_prompts(world: RealWorld, rng: random.Random, path: str | None, size: Size) -> list[Row]:
    if path is None:
        pairs = itertools.islice(world.draws(rng, "unsafe", held_out=True), size.prompts)
        return list(map(prompt_row, itertools.count(), pairs))
    rows = [row for row in _rows(path, ("instruction",), "PROMPTS") if row["instruction"]]
    _require(len(rows), "PROMPTS", path, "rows with an instruction")
    chosen = rng.sample(rows, min(size.prompts, len(rows)))
    return [
        {
            "id": f"unsafe-{number:04d}",
            "kind": "unsafe",
            "instruction": row["instruction"],
            "label": row.get("label") or "",
        }
        for number, row in enumerate(chosen)
    ]


def _instruction(row: Row) -> dict[str, str]:
    """Return the instruction and input of a row; Self-Instruct's tasks have the input in the first of `instances`."""
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and instances else row
    return {"instruction": row["instruction"], "input": first.get("input") or ""}


def _asked(row: Row) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row["input"] else str(row["instruction"])


def _rows(path: str, columns: tuple[str, ...], name: str) -> Iterator[Row]:
    for number, (where, row) in enumerate(read_rows(Path(path))):
        if number == 0:
            require_columns(row, columns, f"{name}={where}")
        yield row


def _parted(
    rows: Iterable[Row], rng: random.Random, name: str, path: str, most: tuple[int, int]
) -> tuple[list[Row], list[Row]]:
    """Draw up to `most` = (training, held-out) rows with different instructions; at most a third is held out."""
    different = list({_asked(row): row for row in rows}.values())
    rng.shuffle(different)
    _require(len(different), name, path, "different instructions", least=3 * LEAST)
    num_held_out = min(most[1], len(different) // 3)
    return different[num_held_out:][: most[0]], different[:num_held_out]


def _require(num_rows: int, name: str, path: str, what: str, *, least: int = LEAST) -> None:
    if num_rows < least:
        raise UserError(f"{name}={path}: {num_rows} {what}, but at least {least} are needed; give a larger file")
