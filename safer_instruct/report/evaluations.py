"""Outputs of evaluate.py: write and read `samples.jsonl`; find and read finished evaluations to compare them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from config.checksums import require_untouched
from config.errors import UserError
from config.files import replacing
from config.names import Kind
from config.paths import find_path
from config.reading import read_json_lines, read_mapping
from safer_instruct.experts.verdicts import Judgement, Outcome
from safer_instruct.measures.rates import JudgedOutput, correctness
from safer_instruct.text.prompt_sets import EvaluationPrompt

AGAIN = "rerun its command to write it again from its ledgers"


class _Checked(BaseModel):
    """What is read of a report or of its samples: a hand may have changed them."""

    model_config = ConfigDict(strict=True)


class _Model(_Checked):
    path: str
    fingerprint: str
    unanswered: dict[str, list[str]] = {}


class _PromptSet(_Checked):
    n: int
    kinds: dict[str, int]
    fingerprint: str


class _Judge(_Checked):
    name: str
    fingerprint: str


class _Decoding(_Checked):
    temperature: float


class _Run(_Checked):
    judge: _Judge
    generation: _Decoding


class _Report(_Checked):
    warnings: list[str]
    models: dict[str, _Model]
    prompts: dict[str, _PromptSet]
    run: _Run


class _Sample(_Checked):
    """A line of `samples.jsonl`."""

    model: str
    set: str
    id: str
    kind: Kind
    label: str
    source: str
    instruction: str
    output: str
    truncated: bool
    outcome: Outcome
    harm_label: str
    specific: bool | None
    correct: bool | None
    helpful: bool | None
    prompt_cut: bool


def find_finished(paths: Sequence[str]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Find (runs of train.py, outputs of evaluate.py) by name; the folder of a sweep stands for everything in it.

    A name is the folder's name, preceded by as many parent folders as make it unique.

    Raises:
        UserError: A path does not exist, or holds neither.
    """
    folders: list[Path] = []
    for path in paths:
        folder = find_path(path)
        if not folder.is_dir():
            raise UserError(f"compare: there is no folder {path}; name runs of train.py, or outputs of evaluate.py")
        inside = sorted(child for child in folder.iterdir() if _is_run(child) or _is_evaluation(child))
        found = [folder] if _is_run(folder) or _is_evaluation(folder) else inside
        if not found:
            raise UserError(
                f"compare: {path} holds no run (config.yaml and metrics.jsonl), no report of evaluate.py (report.json "
                "and samples.jsonl), and no folder with either"
            )
        folders += [one for one in found if not any(map(one.samefile, folders))]
    evaluated = {name: folder for name, folder in _names(folders).items() if _is_evaluation(folder)}
    return {name: folder for name, folder in _names(folders).items() if name not in evaluated}, evaluated


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()


def _is_evaluation(folder: Path) -> bool:
    return (folder / "report.json").is_file() and (folder / "samples.jsonl").is_file()


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    for depth in range(1, 20):
        names = {"/".join(folder.parts[-depth:]): folder for folder in folders}
        if len(names) == len(folders):
            return names
    return {str(folder): folder for folder in folders}


@dataclass(frozen=True, slots=True)
class FinishedEvaluation:
    """The contents of a folder that evaluate.py wrote: its report, and the judged outputs of each model."""

    report: Mapping[str, Any]
    judged: Mapping[str, list[JudgedOutput]]


def read_evaluations(folders: Mapping[str, Path]) -> dict[str, FinishedEvaluation]:
    """Read the evaluations of `find_finished`, and make the names of their models unique.

    Raises:
        UserError: A file cannot be read, or the evaluations have different prompt sets.
    """
    read = {name: _read_evaluation(folder) for name, folder in folders.items()}
    _require_same_prompts(read)
    all_names = [model for evaluation in read.values() for model in evaluation.judged]
    repeated = {model for model in all_names if all_names.count(model) > 1}
    return {name: _rename(evaluation, name, repeated) for name, evaluation in read.items()}


def _rename(evaluation: FinishedEvaluation, name: str, repeated: Iterable[str]) -> FinishedEvaluation:
    """Put the name of the evaluation before each model name that several evaluations share."""
    new = {model: f"{name}: {model}" if model in repeated else model for model in evaluation.judged}
    models = {new[model]: rates for model, rates in evaluation.report["models"].items()}
    judged = {new[model]: rows for model, rows in evaluation.judged.items()}
    return FinishedEvaluation({**evaluation.report, "models": models}, judged)


def _read_evaluation(folder: Path) -> FinishedEvaluation:
    require_untouched(folder)
    try:
        report = read_mapping(folder / "report.json", AGAIN)
        _Report.model_validate(report)
        judged: dict[str, list[JudgedOutput]] = {name: [] for name in report["models"]}
        for model, output in read_samples(folder / "samples.jsonl"):
            judged[model].append(output)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"compare: {folder} holds no report of evaluate.py ({where}: {fault['msg']}); {AGAIN}"
        ) from None
    except KeyError as error:
        raise UserError(
            f"compare: {folder}: samples.jsonl has a model {error} that report.json lacks; {AGAIN}"
        ) from None
    return FinishedEvaluation(report, judged)


def _require_same_prompts(evaluations: Mapping[str, FinishedEvaluation]) -> None:
    contents = {
        name: {key: (one["n"], one["fingerprint"]) for key, one in evaluation.report["prompts"].items()}
        for name, evaluation in evaluations.items()
    }
    for name, content in contents.items():
        first = next(iter(contents))
        if content != contents[first]:
            shown = []
            for whose in (first, name):
                sets = [f"{key} (n={n}, {fingerprint[:8]})" for key, (n, fingerprint) in contents[whose].items()]
                shown.append(f"{whose} has {', '.join(sets)}")
            raise UserError(
                f"models with different prompt sets cannot share a table: {'; '.join(shown)}. Evaluate both on the "
                "same files, under the same names (prompts.NAME.path=FILE)"
            )


def sample_row(model: str, output: JudgedOutput) -> dict[str, Any]:
    """Return one line of `samples.jsonl`."""
    prompt, judgement = output.prompt, output.judgement
    return {
        "model": model,
        "set": prompt.set_name,
        "id": prompt.id,
        "kind": prompt.kind,
        "label": prompt.label,
        "source": prompt.source,
        "instruction": prompt.instruction,
        "output": output.text,
        "truncated": output.truncated,
        "outcome": judgement.outcome,
        "harm_label": judgement.label,
        "specific": judgement.specific,
        "correct": correctness(output),
        "helpful": judgement.helpful,
        "prompt_cut": output.prompt_cut,
    }


def write_samples(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Stream rows to `samples.jsonl`; texts are kept exactly, with JSON escapes for non-ASCII characters."""
    with replacing(path) as partial, partial.open("w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_samples(path: Path) -> Iterator[tuple[str, JudgedOutput]]:
    """Yield the model's name and the judged output of each line of `samples.jsonl`.

    Raises:
        ValidationError: A field is missing, or of another type.
    """
    prompts: dict[tuple[str, str], EvaluationPrompt] = {}  # one for all models: prompts are half of the text
    for row in map(_Sample.model_validate, read_json_lines(path)):
        key = row.set, row.id
        if key not in prompts:
            prompts[key] = EvaluationPrompt(row.id, row.instruction, row.set, row.source, row.label, row.kind)
        judgement = _judgement(row.outcome, row.harm_label, row.specific, row.helpful)
        yield row.model, JudgedOutput(prompts[key], row.output, row.truncated, judgement, row.prompt_cut, row.correct)


@cache
def _judgement(outcome: Outcome, label: str, specific: bool | None, helpful: bool | None) -> Judgement:
    """Return one object for all answers that were judged alike: there may be 100,000 of them."""
    return Judgement(outcome, label, specific, helpful=helpful)
