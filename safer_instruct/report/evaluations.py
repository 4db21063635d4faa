"""Finished runs side by side: runs of train.py, outputs of evaluate.py, or folders that hold several of either."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

from config.errors import UserError
from config.paths import find_path
from safer_instruct.experts.verdicts import Judgement, Outcome
from safer_instruct.measures.rates import JudgedOutput
from safer_instruct.text.prompt_sets import EvaluationPrompt

OUTCOMES: dict[str, Outcome] = {name: name for name in get_args(Outcome)}


def find_finished(paths: Sequence[str]) -> tuple[dict[str, Path], dict[str, Path]]:
    """(runs of train.py, outputs of evaluate.py) by name; a folder of a sweep stands for all that lies in it.

    A name is the folder's, with as many of its parents as tell it from the others.

    Raises:
        UserError: A path that is not there, or holds neither.
    """
    folders: list[Path] = []
    for path in paths:
        folder = find_path(path)
        if not folder.is_dir():
            raise UserError(f"compare: there is no folder {path}; name runs of train.py, or outputs of evaluate.py")
        found = [folder] if _kind(folder) else sorted(child for child in folder.iterdir() if _kind(child))
        if not found:
            raise UserError(
                f"compare: {path} holds no run (config.yaml and metrics.jsonl), no report of evaluate.py (report.json "
                "and samples.jsonl), and no folder with either"
            )
        folders += [one for one in found if one not in folders]
    names = _names(folders)
    trained = {name: folder for name, folder in names.items() if _kind(folder) == "training"}
    return trained, {name: folder for name, folder in names.items() if name not in trained}


def _kind(folder: Path) -> str | None:
    if (folder / "report.json").is_file() and (folder / "samples.jsonl").is_file():
        return "evaluation"
    return "training" if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file() else None


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    for depth in range(1, 20):
        names = {"/".join(folder.parts[-depth:]): folder for folder in folders}
        if len(names) == len(folders):
            return names
    return {str(folder): folder for folder in folders}


@dataclass(frozen=True, slots=True)
class FinishedEvaluation:
    """What an output of evaluate.py holds: its report, and the judged outputs of each model."""

    report: Mapping[str, Any]
    judged: Mapping[str, list[JudgedOutput]]


def read_evaluations(folders: Mapping[str, Path]) -> dict[str, FinishedEvaluation]:
    """The evaluations of `find_finished`, with names that tell all their models apart.

    Raises:
        UserError: A file that cannot be read; models with different prompt sets.
    """
    read = {name: _read_evaluation(folder) for name, folder in folders.items()}
    _require_same_prompts(read)
    all_names = [model for evaluation in read.values() for model in evaluation.judged]
    if len(set(all_names)) == len(all_names):
        return read
    # A model that occurs in two reports is called by the report too, unless both judged the same weights.
    renamed = {}
    for name, evaluation in read.items():
        new = {model: f"{name}: {model}" if all_names.count(model) > 1 else model for model in evaluation.judged}
        models = {new[model]: rest for model, rest in evaluation.report["models"].items()}
        judged = {new[model]: rows for model, rows in evaluation.judged.items()}
        renamed[name] = replace(evaluation, report={**evaluation.report, "models": models}, judged=judged)
    return renamed


def _read_evaluation(folder: Path) -> FinishedEvaluation:
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        judged: dict[str, list[JudgedOutput]] = {name: [] for name in report["models"]}
        prompts: dict[tuple[str, str], EvaluationPrompt] = {}  # one for all models: they are half of the text
        for row in _read_samples(folder / "samples.jsonl"):
            prompt = prompts.setdefault((row["set"], row["id"]), _prompt(row))
            judged[row["model"]].append(_judged_output(prompt, row))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"compare: {folder} holds no readable report of evaluate.py ({type(error).__name__}: {error}); type its "
            "command again to have it written anew from its ledgers"
        ) from None
    return FinishedEvaluation(report, judged)


def _read_samples(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _prompt(row: Mapping[str, Any]) -> EvaluationPrompt:
    return EvaluationPrompt(row["id"], row["instruction"], row["set"], row["source"], row["label"], row["kind"])


def _judged_output(prompt: EvaluationPrompt, row: Mapping[str, Any]) -> JudgedOutput:
    judgement = _judgement(row["outcome"], row["harm_label"], row["specific"], row["helpful"])
    return JudgedOutput(prompt, row["output"], row["truncated"], judgement, row["prompt_cut"], row["correct"])


@cache
def _judgement(outcome: str, label: str, specific: bool | None, helpful: bool | None) -> Judgement:
    """One object for all answers that were judged alike."""
    return Judgement(OUTCOMES[outcome], label, specific, helpful=helpful)


def _require_same_prompts(evaluations: Mapping[str, FinishedEvaluation]) -> None:
    sets = {name: evaluation.report["prompts"] for name, evaluation in evaluations.items()}
    if not sets:
        return
    first = next(iter(sets))
    for name, prompts in sets.items():
        here, there = (
            {key: (one["n"], one["fingerprint"]) for key, one in these.items()} for these in (prompts, sets[first])
        )
        if here != there:
            shown = "; ".join(
                f"{whose} has " + ", ".join(f"{key} (n={n}, {mark[:8]})" for key, (n, mark) in these.items())
                for whose, these in ((first, there), (name, here))
            )
            raise UserError(
                f"models with different prompt sets cannot share a table: {shown}. Evaluate both on the same files, "
                "under the same names (prompts.NAME.path=FILE)"
            )
