"""What the models say to the prompts, and what the judge says of it: behind ledgers, so that nothing is done twice.

A ledger file belongs to one configuration (weights, template, decoding; or the judge), which is part of its name. So an
evaluation that was killed goes on where it was, one with another model or another setting starts files of its own, and
prompts that are added later cost only themselves.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from config.paths import find_path
from config.settings import BackendSettings, EvaluatedModelSettings, ModelSettings
from safer_instruct.experts.verdicts import Judgement
from safer_instruct.generation.completions import describe_decoding
from safer_instruct.induction.ledger import Ledger, read_ledger
from safer_instruct.text.examples import in_shard, text_id
from safer_instruct.text.prompt_sets import EvaluationPrompt
from safer_instruct.text.prompts import render_prompt

if TYPE_CHECKING:
    import torch

    from safer_instruct.experts.expert import Expert
    from safer_instruct.experts.verdicts import Winner

Progress = Callable[[int], object]  # told how many rows are done
WHOLE = (0, 1)  # the shard that holds everything


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's output.

    Attributes:
        text: What the model wrote, up to the first stop string.
        truncated: The limit on new tokens ended it.
        prompt_cut: The instruction lost its end, because the model's context is too short for it.
        error: Why there is no answer, from a small closed vocabulary; "" if there is one.
    """

    text: str
    truncated: bool = False
    prompt_cut: bool = False
    error: str = ""


@dataclass(frozen=True, slots=True)
class Respondent:
    """One model to be evaluated: checked and identified, its weights not loaded."""

    name: str
    path: str
    model: ModelSettings  # behind a server, too: its tokenizer has the template, and its files are its identity
    template: str
    prompt: str  # hash of the template's text: another wording is asked again
    fingerprint: str
    served_as: str | None = None  # its name at a server, where that is not the one of `generation.server`
    base_url: str | None = None  # of a server of its own


def check_model(name: str, settings: EvaluatedModelSettings) -> Respondent:
    """Everything about a model that can be wrong before its weights are loaded.

    Loads the tokenizer, opens the weight files' headers, tries the template, and hashes the files.

    Raises:
        UserError: No model or no tokenizer there, damaged weights, or a template that the tokenizer does not have.
    """
    from safer_instruct.generation.models import check_weight_files, load_tokenizer, model_fingerprint, resolve_archive

    model = ModelSettings(
        name_or_path=settings.base or settings.path,
        archive=settings.path if settings.base else None,
        policy_dtype=settings.dtype,
    )
    prompt = text_id(render_prompt(settings.template, "", tokenizer=load_tokenizer(model)).text)
    if find_path(settings.path).exists() and (folder := resolve_archive(settings.path)).is_dir():
        check_weight_files(folder)
    served = {"served_as": settings.served_as, "base_url": settings.base_url}
    return Respondent(name, settings.path, model, settings.template, prompt, model_fingerprint(model), **served)


def prompt_key(prompt: EvaluationPrompt) -> str:
    """What an answer is filed under: id and text, so that an edited prompt is asked again."""
    return text_id(prompt.id, prompt.instruction)


def own_prompts(prompts: Iterable[EvaluationPrompt], shard: tuple[int, int]) -> list[EvaluationPrompt]:
    """The prompts of a shard (index, count): prompts that ask the same are in one shard, and are judged there."""
    return [prompt for prompt in prompts if in_shard(text_id(prompt.instruction), *shard)]


def generate_answers(
    respondent: Respondent,
    prompts: Iterable[EvaluationPrompt],
    *,
    generation: BackendSettings,
    stop: Sequence[str],
    device: torch.device,
    folder: Path,
    progress: Progress,
    shard: tuple[int, int] = WHOLE,
) -> dict[str, Answer]:
    """The model's answer to every prompt, by `prompt_key`; the model is loaded only if one is missing.

    What other shards have answered is read from their ledgers, not asked again.

    Raises:
        UserError: The model cannot be loaded, the limits leave no room for a prompt, or the ledger is broken or in use.
    """
    prompt_identity = {"template": respondent.template, "prompt": respondent.prompt}
    configuration = {"model": respondent.fingerprint, **prompt_identity, **describe_decoding(generation)}
    if generation.backend == "openai":
        configuration["served_as"] = respondent.served_as or generation.server.model
    asked = {prompt_key(prompt): prompt for prompt in prompts}
    with _Records(folder, f"generate-{respondent.name}", configuration, shard) as records:
        missing = {key: prompt for key, prompt in asked.items() if key not in records}
        progress(len(asked) - len(missing))
        if missing:
            for record in _generate(respondent, missing, generation, device):
                records.append(record)
                progress(1)
        return {key: _to_answer(records[key], stop) for key in asked}


def _to_answer(record: Mapping[str, Any], stop: Sequence[str]) -> Answer:
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
    generator = build_generator(
        respondent.model,
        replace(settings, server=server),
        device,
        templates=[render_prompt(respondent.template, "", tokenizer=tokenizer)],
        name=respondent.name,
        fingerprint=respondent.fingerprint,
    )
    requests = [
        Request(key, render_prompt(respondent.template, prompt.instruction, tokenizer=tokenizer))
        for key, prompt in prompts.items()
    ]
    for generation in generator.generate(requests):
        yield {
            "id": generation.id,
            "text": generation.text,
            "truncated": generation.truncated,
            "prompt_cut": generation.prompt_cut,
            "new_tokens": generation.new_tokens,
            "error": generation.error,
            **({"thought": generation.thought} if generation.thought else {}),
        }


def judge_answers(
    judge: Expert,
    pairs: Sequence[tuple[str, str]],
    *,
    folder: Path,
    progress: Progress,
    shard: tuple[int, int] = WHOLE,
) -> list[Judgement]:
    """The judgement of every (instruction, output) pair, in their order.

    Equal pairs are judged once: two models that say the same to the same prompt are judged the same.

    Raises:
        UserError: The judge cannot work any more (its message), or the ledger is broken or in use.
    """
    keys = [text_id(instruction, output) for instruction, output in pairs]
    distinct = dict(zip(keys, pairs, strict=True))
    with _Records(folder, "judge", {"judge": judge.fingerprint("judge")}, shard) as records:
        missing = [(key, *pair) for key, pair in distinct.items() if key not in records]
        progress(len(distinct) - len(missing))
        for key, judgement in judge.judge(missing) if missing else ():
            records.append({"id": key, **asdict(judgement)})
            progress(1)
        return [_to_judgement(records[key]) for key in keys]


def judge_pairs(
    judge: Expert, items: Sequence[tuple[str, str, str]], *, folder: Path, progress: Progress
) -> dict[str, Winner]:
    """Which of the two answers of each (instruction, first, second) helps more, by the `text_id` of the three.

    Raises:
        UserError: As `judge_answers`; a judge that cannot compare.
    """
    distinct = {text_id(*item): item for item in items}
    with _Records(folder, "compare", {"judge": judge.fingerprint("compare")}, WHOLE) as records:
        missing = [(key, *item) for key, item in distinct.items() if key not in records]
        progress(len(distinct) - len(missing))
        for key, winner in judge.compare(missing) if missing else ():
            records.append({"id": key, "winner": winner})
            progress(1)
        return {key: records[key]["winner"] for key in distinct}


class _Records:
    """The ledger of one configuration and shard, together with what the ledgers of the other shards hold."""

    def __init__(self, folder: Path, stem: str, configuration: Mapping[str, Any], shard: tuple[int, int]) -> None:
        path = _ledger_path(folder, stem, configuration)
        index, count = shard
        own = path if count == 1 else path.with_name(f"{path.stem}-{index:05d}-of-{count:05d}{path.suffix}")
        others = [other for other in sorted(folder.glob(f"{glob.escape(path.stem)}*{path.suffix}")) if other != own]
        self._others = [read_ledger(other)[1] for other in others if other.stat().st_size]
        self._ledger = Ledger(own, configuration)

    def __enter__(self) -> Self:
        self._ledger.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._ledger.__exit__(*error)

    def __contains__(self, key: str) -> bool:
        return any(key in records for records in (self._ledger.records, *self._others))

    def __getitem__(self, key: str) -> Mapping[str, Any]:
        return next(records[key] for records in (self._ledger.records, *self._others) if key in records)

    def append(self, record: dict[str, Any]) -> None:
        self._ledger.append(record)


def _to_judgement(record: Mapping[str, Any]) -> Judgement:
    return Judgement(**{name: value for name, value in record.items() if name != "id"})


def _ledger_path(folder: Path, stem: str, configuration: Mapping[str, Any]) -> Path:
    digest = hashlib.blake2b(json.dumps(configuration, sort_keys=True).encode(), digest_size=6).hexdigest()
    return folder / f"{re.sub(r'[^A-Za-z0-9.-]', '_', stem)}-{digest}.jsonl"
