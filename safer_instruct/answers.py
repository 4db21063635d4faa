"""What the models say to the prompts, and what the judge says of it: behind ledgers, so that nothing is done twice.

A ledger file belongs to one configuration (weights, template, decoding; or the judge), which is part of its name. So an
evaluation that was killed goes on where it was, one with another model or another setting starts files of its own, and
prompts that are added later cost only themselves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.paths import find_path
from config.settings import EvaluatedModelSettings, GenerationSettings, ModelSettings
from safer_instruct.examples import text_id
from safer_instruct.ledger import Ledger
from safer_instruct.prompt_sets import EvaluationPrompt
from safer_instruct.prompts import render_prompt
from safer_instruct.verdicts import Judgement

if TYPE_CHECKING:
    import torch

    from safer_instruct.experts import Expert

JUDGE_BATCH = 256  # outputs that the judge is given at a time: what a killed process can lose
Progress = Callable[[int], object]  # told how many rows are done


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's output.

    Attributes:
        text: What the model wrote.
        truncated: The limit on new tokens ended it.
        prompt_cut: The instruction lost its end, because the model's context is too short for it.
    """

    text: str
    truncated: bool
    prompt_cut: bool


@dataclass(frozen=True, slots=True)
class Respondent:
    """One model to be evaluated: checked and identified, its weights not loaded."""

    name: str
    path: str
    model: ModelSettings
    template: str
    prompt: str  # hash of the template's text: another wording is asked again
    fingerprint: str


def check_model(name: str, settings: EvaluatedModelSettings) -> Respondent:
    """Everything about a model that can be wrong before its weights are loaded.

    Loads the tokenizer, opens the weight files' headers, tries the template, and hashes the files.

    Raises:
        UserError: No model or no tokenizer there, damaged weights, or a template that the tokenizer does not have.
    """
    from safer_instruct.models import check_weight_files, load_tokenizer, model_fingerprint, resolve_archive

    model = ModelSettings(
        name_or_path=settings.base or settings.path,
        archive=settings.path if settings.base else None,
        policy_dtype=settings.dtype,
    )
    prompt = text_id(render_prompt(settings.template, "", tokenizer=load_tokenizer(model)).text)
    if find_path(settings.path).exists() and (folder := resolve_archive(settings.path)).is_dir():
        check_weight_files(folder)
    return Respondent(name, settings.path, model, settings.template, prompt, model_fingerprint(model))


def prompt_key(prompt: EvaluationPrompt) -> str:
    """What an answer is filed under: id and text, so that an edited prompt is asked again."""
    return text_id(prompt.id, prompt.instruction)


def generate_answers(
    respondent: Respondent,
    prompts: Iterable[EvaluationPrompt],
    *,
    generation: GenerationSettings,
    device: torch.device,
    folder: Path,
    progress: Progress,
) -> dict[str, Answer]:
    """The model's answer to every prompt, by `prompt_key`; the model is loaded only if one is missing.

    Raises:
        UserError: The model cannot be loaded, the limits leave no room for a prompt, or the ledger is broken or in use.
    """
    prompt_identity = {"template": respondent.template, "prompt": respondent.prompt}
    configuration = {"model": respondent.fingerprint, **prompt_identity, **_decoding(generation)}
    asked = {prompt_key(prompt): prompt for prompt in prompts}
    with Ledger(_ledger_path(folder, f"generate-{respondent.name}", configuration), configuration) as ledger:
        missing = {key: prompt for key, prompt in asked.items() if key not in ledger.records}
        progress(len(asked) - len(missing))
        if missing:
            for record in _generate(respondent, missing, generation, device):
                ledger.append(record)
                progress(1)
        records = {key: ledger.records[key] for key in asked}
    return {key: Answer(one["text"], one["truncated"], one["prompt_cut"]) for key, one in records.items()}


def _generate(
    respondent: Respondent, prompts: Mapping[str, EvaluationPrompt], settings: GenerationSettings, device: torch.device
) -> Iterable[dict[str, Any]]:
    from safer_instruct.generation import HFGenerator, Request
    from safer_instruct.models import load_causal_lm, load_tokenizer

    tokenizer = load_tokenizer(respondent.model)
    model = load_causal_lm(respondent.model).to(device)  # type: ignore[arg-type]  # a decorator hides nn.Module.to
    generator = HFGenerator(model, tokenizer, settings, name=respondent.name, fingerprint=respondent.fingerprint)
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
        }


def judge_answers(
    expert: Expert, pairs: Sequence[tuple[str, str]], *, folder: Path, progress: Progress
) -> list[Judgement]:
    """The judgement of every (instruction, output) pair, in their order.

    Equal pairs are judged once: two models that say the same to the same prompt are judged the same.

    Raises:
        UserError: The judge cannot work any more (its message), or the ledger is broken or in use.
    """
    configuration = {"judge": expert.fingerprint}
    keys = [text_id(instruction, output) for instruction, output in pairs]
    distinct = dict(zip(keys, pairs, strict=True))
    with Ledger(_ledger_path(folder, "judge", configuration), configuration) as ledger:
        missing = [(key, *pair) for key, pair in distinct.items() if key not in ledger.records]
        progress(len(distinct) - len(missing))
        for start in range(0, len(missing), JUDGE_BATCH):
            items = missing[start : start + JUDGE_BATCH]
            for (key, _, _), judgement in zip(items, expert.judge(items), strict=True):
                ledger.append({"id": key, **asdict(judgement)})
                progress(1)
            ledger.sync()
        return [_to_judgement(ledger.records[key]) for key in keys]


def _to_judgement(record: Mapping[str, Any]) -> Judgement:
    return Judgement(**{name: value for name, value in record.items() if name != "id"})


def _decoding(generation: GenerationSettings) -> dict[str, Any]:
    """The settings that an output depends on: no batch size, and no seed where nothing is drawn."""
    if generation.temperature == 0:
        return {"max_new_tokens": generation.max_new_tokens, "temperature": 0.0}
    return {name: value for name, value in asdict(generation).items() if name != "max_batch_tokens"}


def _ledger_path(folder: Path, stem: str, configuration: Mapping[str, Any]) -> Path:
    digest = hashlib.blake2b(json.dumps(configuration, sort_keys=True).encode(), digest_size=6).hexdigest()
    return folder / f"{re.sub(r'[^A-Za-z0-9.-]', '_', stem)}-{digest}.jsonl"
