"""Prompts that should be answered: the rows of stage=replay and stage=contrast, and the stages that fill their ledgers.

Both start from prompts whose ids are hashes of their instructions, so a record can never describe a different prompt,
and the shards partition the same prompts whatever their number. `dataset/benign.py` makes the pairs from the records.
Prompts and records are held in memory: these files have thousands of rows, not millions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.errors import UserError
from config.names import BENIGN_STAGES
from config.paths import find_path
from config.settings import BackendSettings, BenignSettings, ModelSettings, ReplaySettings
from safer_instruct.experts.expert import Expert
from safer_instruct.experts.verdicts import HARMLESS
from safer_instruct.generation.backends import TemplatedModel, model_name
from safer_instruct.generation.completions import Request, TextGenerator, describe_decoding
from safer_instruct.generation.models import load_tokenizer
from safer_instruct.generation.trained_as import model_as_trained
from safer_instruct.induction.ledger import Record, read_ledger, shard_path
from safer_instruct.induction.ledgers import check_chain, stage_ledgers
from safer_instruct.induction.shard import complete
from safer_instruct.induction.stages import Stage, expert_configuration, paid, require_records
from safer_instruct.text.examples import Example, in_shard, is_unicode, normalise, text_id
from safer_instruct.text.messages import has_history
from safer_instruct.text.prompts import Prompt, reversed_target
from safer_instruct.text.readers import read_rows, require_columns

if TYPE_CHECKING:
    import torch

REPLAY, CONTRAST = BENIGN_STAGES
NEIGHBOUR, SCREEN, ANSWER = BENIGN_STAGES[CONTRAST]
LATER_TURN = "later_turn"  # why a row is left out: it continues a conversation


@dataclass(frozen=True)
class Prompts:
    """The prompts of a stage, of all shards, in file order."""

    # All have `instruction`. For replay, `chosen` is the file's answer, if it is used; for contrast, `rejected` and
    # `chosen` come from the unsafe row.
    examples: list[Example]
    dropped: Counter[str]  # reason -> number of unusable rows

    def of_shard(self, index: int, count: int) -> list[Example]:
        """Return the prompts of one shard."""
        return [example for example in self.examples if in_shard(example.id, index, count)]


def read_benign(
    settings: BenignSettings, replay: ReplaySettings, *, unsafe: Collection[str], excluded: Callable[[str], str]
) -> Prompts:
    """Read the harmless instructions.

    `unsafe` holds the normalised instructions of the unsafe dataset. `excluded` maps a normalised instruction to the
    reason for leaving it out (it is in a test set), or to "".

    Raises:
        UserError: A missing or broken file, a missing column, no usable row.
    """
    dropped: Counter[str] = Counter()
    examples: list[Example] = []
    seen: set[str] = set()
    needed = ["instruction", *(["output"] if replay.answers == "file" else [])]
    for where, row in read_rows(find_path(settings.path), columns=settings.columns):
        require_columns(row, needed, where, "benign.columns")
        if settings.max_rows is not None and len(examples) >= settings.max_rows:
            break
        texts = [row["instruction"], row.get("input") or "", row["output"] if replay.answers == "file" else ""]
        reason = LATER_TURN if has_history(row.get("history")) else _why_no_prompt(texts, needed)
        if not reason:
            instruction = reversed_target(texts[0].strip(), texts[1].strip())
            key = normalise(instruction)
            reason = "unsafe_instruction" if key in unsafe else excluded(key)
            if key in seen:
                reason = "duplicate_instruction"
            seen.add(key)
        if reason:
            dropped[reason] += 1
            continue
        answer = texts[2].strip() or None
        id = text_id(instruction) if answer is None else text_id(instruction, answer)
        examples.append(Example(id, instruction, chosen=answer, provenance={"source": Path(where).name}))
    if not examples:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in sorted(dropped.items())) or "it is empty"
        raise UserError(f"benign.path={settings.path}: none of its rows can be used ({reasons})")
    return Prompts(examples, dropped)


def _why_no_prompt(texts: Sequence[Any], needed: Sequence[str]) -> str:
    if not all(text is None or isinstance(text, str) for text in texts):
        return "not_text"
    if not (texts[0] or "").strip():
        return "empty_instruction"
    if "output" in needed and not (texts[2] or "").strip():
        return "empty_output"
    return "" if is_unicode(*(text or "" for text in texts)) else "not_unicode"


def read_unsafe(rows: Sequence[Example], num_rows: int | None) -> Prompts:
    """Draw the unsafe instructions that get a neighbour: `num_rows` of them (None: all) by a hash, one row for each.

    Later turns of conversations get none: on their own they say too little, and the messages before them may not be
    harmless. A neighbour does not use the row's system prompt.

    Raises:
        UserError: There are only later turns.
    """
    alone = [row for row in rows if not row.history]
    if not alone:
        raise UserError(
            f"path: all {len(rows)} rows are later turns of conversations (column history), and stage=contrast makes "
            "neighbours of first turns only: give a dataset that has some"
        )
    first: dict[str, Example] = {}
    for row in alone:
        first.setdefault(normalise(row.instruction or ""), row)
    drawn = sorted(first, key=lambda instruction: text_id("contrast", instruction))[:num_rows]
    kept = set(drawn)
    examples = [replace(row, id=text_id(row.instruction or ""), system="") for key, row in first.items() if key in kept]
    dropped = {LATER_TURN: len(rows) - len(alone), "repeated_instruction": len(alone) - len(first)}
    return Prompts(examples, Counter(dropped))


def starting_model(
    replay: ReplaySettings, model: ModelSettings, generation: BackendSettings, device: torch.device
) -> tuple[TextGenerator | None, dict[str, Any]]:
    """Return the starting model (checked), and the configuration that the replay stage's records depend on.

    If the answers come from the file, there is no model, and each answer is part of its row's id.
    """
    if replay.answers == "file":
        return None, {"answers": replay.answers}
    typed = replay.template, replay.system
    asked_as = model_as_trained(model, load_tokenizer(model), *typed, key="replay", model_key="model")
    empty = [Prompt("", "", "")]
    generator = TemplatedModel(model, generation, device, asked_as, prompts=empty, key="generation")
    generator.check()
    asked = {"answers": replay.answers, "model": model_name(model), "model_fingerprint": generator.fingerprint}
    decoding = {f"generation.{name}": value for name, value in describe_decoding(generation).items()}
    return generator, {**asked, "replay.template": asked_as.template, **decoding}


def run_replay(
    examples: Sequence[Example], path: Path, generator: TextGenerator | None, configuration: Mapping[str, Any]
) -> None:
    """Answer the prompts that are missing from the ledger.

    The generator is the starting model; without one, the answers come from the file.
    """

    def answer(examples: Sequence[Example]) -> Iterator[Record]:
        if generator is None:
            yield from ({"id": one.id, "answer": one.chosen, "truncated": False, "tokens": 0} for one in examples)
            return
        requests = [Request(example.id, Prompt("", example.instruction or "", "")) for example in examples]
        for one in generator.generate(requests):
            record = {"id": one.id, "answer": one.text.strip(), "truncated": one.truncated}
            record |= {"prompt_cut": one.prompt_cut, "tokens": one.tokens}
            yield {**record, **({"error": one.error} if one.error else {}), **paid(one.cost)}

    complete(path, configuration, examples, answer)


def run_contrast(expert: Expert, examples: Sequence[Example], paths: Mapping[str, Path]) -> None:
    """Let the expert write a neighbour of each unsafe instruction, screen these, and answer the harmless ones."""
    configuration = expert_configuration(expert, {}, "neighbour")
    complete(paths[NEIGHBOUR], configuration, examples, _writing(expert, "neighbour"))
    before, neighbours = read_ledger(paths[NEIGHBOUR])
    pairs = with_neighbours(examples, neighbours)
    complete(paths[SCREEN], expert_configuration(expert, before, "screen"), pairs, _screening(expert))
    before, verdicts = read_ledger(paths[SCREEN])
    require_records(pairs, verdicts, SCREEN)
    harmless = [pair for pair in pairs if verdicts[pair.id]["reason"] == HARMLESS]
    complete(paths[ANSWER], expert_configuration(expert, before, "answer"), harmless, _writing(expert, "answer"))


def with_neighbours(examples: Sequence[Example], neighbours: Mapping[str, Record]) -> list[Example]:
    """Return the rows that have a neighbour, with the neighbour as their instruction.

    If the unsafe response is withheld, the safe response replaces it, as the verdict depends on the instruction.
    """
    require_records(examples, neighbours, NEIGHBOUR)
    found = ((example, neighbours[example.id]["neighbour"]) for example in examples)
    return [
        replace(example, instruction=text, rejected=example.rejected or example.chosen)
        for example, text in found
        if text is not None
    ]


def _writing(expert: Expert, role: str) -> Stage:
    """Build the stage in which the expert writes one text for each example, recorded under the role's name."""

    def run(examples: Sequence[Example]) -> Iterator[Record]:
        for id, one in expert.write(role, examples):
            yield {"id": id, role: one.text, "reason": one.reason, "tokens": one.tokens, **paid(one.cost)}

    return run


def _screening(expert: Expert) -> Stage:
    def run(pairs: Sequence[Example]) -> Iterator[Record]:
        for id, verdict in expert.screen(pairs):
            yield {"id": id, "reason": verdict.reason, "tokens": verdict.tokens, **paid(verdict.cost)}

    return run


def read_records(folder: Path, stage: str, count: int) -> dict[str, dict[str, Record]]:
    """Return ledger name -> id -> record over all shards of a stage; no records until every ledger has been started.

    Raises:
        UserError: The shards have different configurations, or a ledger was made from records that have since changed.
    """
    paths = [shard_path(folder, name, index, count) for name in BENIGN_STAGES[stage] for index in range(count)]
    if not all(path.is_file() and path.stat().st_size for path in paths):
        return {name: {} for name in BENIGN_STAGES[stage]}
    ledgers = {name: stage_ledgers(folder, name, count) for name in BENIGN_STAGES[stage]}
    check_chain(folder, ledgers)
    return {name: of_stage.by_id() for name, of_stage in ledgers.items()}


def num_missing(stage: str, prompts: Sequence[Example], records: Mapping[str, Mapping[str, Record]]) -> int:
    """Return how many prompts still lack a record; see read_records."""
    return sum(not _is_done(stage, prompt.id, records) for prompt in prompts)


def _is_done(stage: str, id: str, records: Mapping[str, Mapping[str, Record]]) -> bool:
    if stage == REPLAY:
        return id in records[REPLAY]
    if id not in records[NEIGHBOUR]:
        return False
    if records[NEIGHBOUR][id]["neighbour"] is None:
        return True
    return id in records[SCREEN] and (records[SCREEN][id]["reason"] != HARMLESS or id in records[ANSWER])
