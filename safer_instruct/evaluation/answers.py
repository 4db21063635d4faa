"""Generate and judge answers behind ledgers, so that no work is done twice.

Each ledger file belongs to one configuration (weights, template, decoding; or the judge), whose hash is in its name. So
a killed evaluation resumes where it stopped, another model or setting gets its own files, and after adding prompts only
the new ones are run.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.settings import BackendSettings
from safer_instruct.evaluation.respondents import Respondent
from safer_instruct.experts.verdicts import Judgement
from safer_instruct.generation.completions import describe_decoding
from safer_instruct.induction.ledger import Ledger, is_final, read_ledger, settle
from safer_instruct.text.examples import in_shard, short_hash, text_id
from safer_instruct.text.prompt_sets import EvaluationPrompt
from safer_instruct.text.prompts import render_prompt

if TYPE_CHECKING:
    import torch

    from safer_instruct.experts.expert import Expert
    from safer_instruct.experts.verdicts import Winner

Advance = Callable[[int], object]  # called with the number of rows just finished
Record = Mapping[str, Any]
WHOLE = (0, 1)  # the shard that holds everything


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer to one prompt."""

    text: str  # what the model wrote, up to the first stop string
    truncated: bool = False  # it reached the limit on new tokens
    prompt_cut: bool = False  # the end of the instruction was cut to fit the model's context
    error: str = ""  # why there is no answer, from a small closed vocabulary; "" if there is one


def prompt_key(prompt: EvaluationPrompt) -> str:
    """Return the key of a prompt's answer: a hash of its id and text, so that an edited prompt is answered again."""
    return text_id(prompt.id, prompt.instruction)


def own_prompts(prompts: Iterable[EvaluationPrompt], shard: tuple[int, int]) -> list[EvaluationPrompt]:
    """Return the prompts of a shard (index, count); prompts with the same instruction are always in the same shard."""
    return [prompt for prompt in prompts if in_shard(text_id(prompt.instruction), *shard)]


def generate_answers(
    respondent: Respondent,
    prompts: Iterable[EvaluationPrompt],
    *,
    generation: BackendSettings,
    stop: Sequence[str],
    device: torch.device,
    folder: Path,
    progress: Advance,
    shard: tuple[int, int] = WHOLE,
) -> dict[str, Answer]:
    """Return the model's answer to every prompt, by `prompt_key`; the model is loaded only if one is missing.

    Answers from other shards are read from their ledgers, not generated again.

    Raises:
        UserError: The model cannot be loaded, the limits leave no room for a prompt, or the ledger is broken or in use.
    """
    asked = {prompt_key(prompt): prompt for prompt in prompts}

    def generate(missing: Sequence[str]) -> Iterable[Record]:
        return _generate(respondent, {key: asked[key] for key in missing}, generation, device)

    records = _complete(folder, answers_identity(respondent, generation), shard, asked, generate, progress)
    return {key: _to_answer(record, stop) for key, record in records.items()}


Identity = tuple[str, dict[str, Any]]  # of a ledger: the stem of its name, and the configuration its records depend on


def answers_identity(respondent: Respondent, generation: BackendSettings) -> Identity:
    """Return the identity of the ledgers of a model's answers."""
    configuration = {"model": respondent.fingerprint, "template": respondent.template, "prompt": respondent.prompt}
    configuration |= describe_decoding(generation)
    if generation.backend == "openai":
        configuration["served_as"] = respondent.served_as or generation.server.model
    return f"generate-{respondent.name}", configuration


def judge_identity(judge: Expert, role: str = "judge") -> Identity:
    """Return the identity of the ledgers of a judge's judgements, or of its comparisons with role=compare."""
    return role, {"judge": judge.fingerprint(role)}


def ledger_name(identity: Identity) -> str:
    """Return the prefix that the names of these ledgers share in all shards."""
    stem, configuration = identity
    digest = short_hash(json.dumps(configuration, sort_keys=True), 6)
    return f"{re.sub(r'[^A-Za-z0-9.-]', '_', stem)}-{digest}"


def ledger_path(folder: Path, identity: Identity, shard: tuple[int, int]) -> Path:
    """Return the ledger of a shard (index, count)."""
    index, count = shard
    return folder / (ledger_name(identity) + ("" if count == 1 else f"-{index:05d}-of-{count:05d}") + ".jsonl")


def ledger_paths(folder: Path, identity: Identity) -> list[Path]:
    """Return the ledgers of all shards that are there."""
    return sorted(folder.glob(f"{glob.escape(ledger_name(identity))}*.jsonl"))


def _to_answer(record: Record, stop: Sequence[str]) -> Answer:
    text, truncated = record["text"], record["truncated"]
    ends = [found for string in stop if (found := text.find(string)) >= 0]
    if ends:
        text, truncated = text[: min(ends)], False
    return Answer(text, truncated, record["prompt_cut"], record.get("error", ""))


def _generate(
    respondent: Respondent, prompts: Mapping[str, EvaluationPrompt], settings: BackendSettings, device: torch.device
) -> Iterable[dict[str, Any]]:
    from safer_instruct.generation.backends import build_generator
    from safer_instruct.generation.completions import Request
    from safer_instruct.generation.models import load_tokenizer

    tokenizer = load_tokenizer(respondent.model)
    server = replace(
        settings.server,
        model=respondent.served_as or settings.server.model,
        base_url=respondent.base_url or settings.server.base_url,
    )
    render = partial(render_prompt, respondent.template, tokenizer=tokenizer, system=respondent.system)
    generator = build_generator(
        respondent.model,
        replace(settings, server=server),
        device,
        templates=[render("")],
        name=respondent.name,
        fingerprint=respondent.fingerprint,
    )
    requests = [Request(key, render(prompt.instruction)) for key, prompt in prompts.items()]
    kept = ("id", "text", "truncated", "prompt_cut", "new_tokens", "error")
    for generation in generator.generate(requests):
        record = asdict(generation)
        thought = {"thought": generation.thought} if generation.thought else {}
        yield {name: record[name] for name in kept} | thought


def judge_answers(
    judge: Expert, pairs: Sequence[tuple[str, str]], *, folder: Path, progress: Advance, shard: tuple[int, int] = WHOLE
) -> list[Judgement]:
    """Return the judgement of every (instruction, output) pair, in order.

    Equal pairs are judged once, so models that give the same answer get the same judgement.

    Raises:
        UserError: The judge fails for good (its message), or the ledger is broken or in use.
    """
    keys = [text_id(instruction, output) for instruction, output in pairs]
    distinct = dict(zip(keys, pairs, strict=True))

    def ask(missing: Sequence[str]) -> Iterable[Record]:
        for key, judgement in judge.judge([(key, *distinct[key]) for key in missing]):
            yield {"id": key, **asdict(judgement)}

    records = _complete(folder, judge_identity(judge), shard, distinct, ask, progress)
    names = [field.name for field in fields(Judgement)]
    return [Judgement(**{name: records[key][name] for name in names if name in records[key]}) for key in keys]


def judge_pairs(
    judge: Expert, items: Sequence[tuple[str, str, str]], *, folder: Path, progress: Advance
) -> dict[str, Winner]:
    """Return which answer of each (instruction, first, second) is more helpful, by the `text_id` of the three.

    Raises:
        UserError: As in `judge_answers`, or the judge cannot compare.
    """
    distinct = {text_id(*item): item for item in items}

    def ask(missing: Sequence[str]) -> Iterable[Record]:
        for key, found in judge.compare([(key, *distinct[key]) for key in missing]):
            yield {"id": key, **asdict(found)}

    records = _complete(folder, judge_identity(judge, "compare"), WHOLE, distinct, ask, progress)
    return {key: record["winner"] for key, record in records.items()}


def _complete(
    folder: Path,
    identity: Identity,
    shard: tuple[int, int],
    keys: Iterable[str],
    make: Callable[[Sequence[str]], Iterable[Record]],
    progress: Advance,
) -> dict[str, Record]:
    """Return the record of every key: from the ledger of any shard, or else made now and written to our own.

    `make` is called once, with the keys that are missing or were not answered, or not at all; `progress` is told first
    of all records that were there, then of each new one.
    """
    own = ledger_path(folder, identity, shard)
    known: dict[str, dict[str, Any]] = {}
    with Ledger(own, identity[1]) as ledger:
        others = [other for other in ledger_paths(folder, identity) if other != own and other.stat().st_size]
        for records in (ledger.records, *(read_ledger(other, identity[1])[1] for other in others)):
            for record in records.values():
                settle(known, record)
        wanted = list(keys)
        missing = [key for key in wanted if key not in known or not is_final(known[key])]
        progress(len(wanted) - len(missing))
        for made in make(missing) if missing else ():
            record = dict(made)
            ledger.append(record)
            known[record["id"]] = record
            progress(1)
        return {key: known[key] for key in wanted}
