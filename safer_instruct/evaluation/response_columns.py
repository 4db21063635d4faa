"""Read answers from a file that has one column per model, as in the published test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import xxhash

from config.errors import UserError
from config.settings import THOUGHT_TAGS, ModelSettings, PromptSetSettings
from safer_instruct.evaluation.answers import Answer, prompt_key
from safer_instruct.evaluation.respondents import Respondent
from safer_instruct.experts.verdicts import Outcome
from safer_instruct.generation.completions import split_thought
from safer_instruct.text.prompt_sets import read_prompts

NOT_MODELS = frozenset({"id", "instruction", "input", "label", "source", "kind", "reference"})
HAND_LABELS = ("harmful", "refusal", "safe")
NO_ANSWER = "empty_cell"


def read_columns(
    sets: Mapping[str, PromptSetSettings], columns: Sequence[str], thought_tags: Sequence[str] = THOUGHT_TAGS
) -> tuple[dict[str, Respondent], dict[str, dict[str, Answer]]]:
    """Read the models and their answers, by column and `prompt_key`; an empty cell is an `Answer` with an error.

    Without `columns`, every column that is not part of the prompt is a model. Thoughts are cut from the answers.

    Raises:
        UserError: A file cannot be read, a column is missing, or the files have different columns.
    """
    answers: dict[str, dict[str, Answer]] = {}
    found: dict[str, list[str]] = {}
    for set_name, settings in sets.items():
        known = NOT_MODELS | {settings.source_column, *settings.columns, *settings.hand_labels.values()}
        for prompt, row in read_prompts(set_name, settings):
            if set_name not in found:
                found[set_name] = [name for name in row if name not in known]
                _check_columns(settings.path, found, set_name, columns)
            for name in columns or found[set_name]:
                answers.setdefault(name, {})[prompt_key(prompt)] = _answer(row.get(name), thought_tags)
    paths = ", ".join(settings.path for settings in sets.values())
    return {name: _respondent(name, paths, of_model) for name, of_model in answers.items()}, answers


def read_hand_labels(sets: Mapping[str, PromptSetSettings]) -> dict[str, dict[str, Outcome]]:
    """Read the human labels of the answers, by model and `prompt_key`; an empty cell is no label.

    Raises:
        UserError: A column is missing, or holds something other than harmful, refusal or safe.
    """
    labels: dict[str, dict[str, Outcome]] = {}
    for set_name, settings in sets.items():
        for prompt, row in read_prompts(set_name, settings) if settings.hand_labels else ():
            for model, column in settings.hand_labels.items():
                key = f"prompts.{set_name}.hand_labels.{model}={column}"
                if model not in row or column not in row:
                    raise UserError(f"{settings.path}: {key}: there is no column {model if column in row else column}")
                said = str(row[column] or "").strip().casefold()
                if said and said not in HAND_LABELS:
                    raise UserError(
                        f"{settings.path}: {key}: a label must be one of {', '.join(HAND_LABELS)}, or empty"
                    )
                if said:
                    labels.setdefault(model, {})[prompt_key(prompt)] = cast(Outcome, said)
    return labels


def _answer(cell: Any, thought_tags: Sequence[str]) -> Answer:
    if cell is None or not str(cell).strip():
        return Answer("", error=NO_ANSWER)
    _, answer, has_ended = split_thought(str(cell), thought_tags)
    return Answer(answer, truncated=not has_ended)


def _check_columns(path: str, found: Mapping[str, list[str]], set_name: str, columns: Sequence[str]) -> None:
    here = found[set_name]
    listed = ", ".join(here) or "none"
    missing = [name for name in columns if name not in here]
    if missing:
        raise UserError(
            f"{path}: columns=[{','.join(columns)}]: there is no column {', '.join(missing)}; the columns that can be "
            f"models are: {listed}"
        )
    if not here:
        raise UserError(f"{path}: responses=csv needs one column of answers per model, and this file has none")
    first = next(iter(found))
    if not columns and sorted(here) != sorted(found[first]):
        raise UserError(
            f"the prompt sets have different models: prompts.{first} has answers of {', '.join(found[first])}, and "
            f"prompts.{set_name} of {listed}; name the models that both have with columns=[NAME,...]"
        )


def _respondent(name: str, paths: str, answers: Mapping[str, Answer]) -> Respondent:
    digest = xxhash.xxh3_128()
    for key, answer in answers.items():
        digest.update(f"{key} {answer.text}".encode("utf-8", "surrogatepass"))
    return Respondent(name, f"column {name} of {paths}", ModelSettings(), "", "", digest.hexdigest())
