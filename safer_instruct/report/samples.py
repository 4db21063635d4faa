"""The rows of `samples.jsonl`, a prompt with an answer and its judgement: written, read, and picked for the page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

from config.files import replacing
from safer_instruct.experts.verdicts import Judgement, Outcome
from safer_instruct.measures.rates import JudgedOutput, correctness
from safer_instruct.text.prompt_sets import EvaluationPrompt

OUTCOMES: dict[str, Outcome] = {name: name for name in get_args(Outcome)}


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
    """Stream rows to `samples.jsonl`; a text stays as the model gave it, in JSON escapes where it is not ASCII."""
    with replacing(path) as partial, partial.open("w", encoding="ascii") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read_samples(path: Path) -> Iterator[tuple[str, JudgedOutput]]:
    """Yield the model's name and the judged output of each line of `samples.jsonl`.

    Raises:
        ValueError: A line is not JSON.
        KeyError: A line lacks a field.
    """
    prompts: dict[tuple[str, str], EvaluationPrompt] = {}  # one for all models: prompts are half of the text
    with path.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            key = row["set"], row["id"]
            if key not in prompts:
                prompts[key] = EvaluationPrompt(
                    row["id"], row["instruction"], row["set"], row["source"], row["label"], row["kind"]
                )
            judgement = _judgement(row["outcome"], row["harm_label"], row["specific"], row["helpful"])
            prompt_cut, correct = row["prompt_cut"], row["correct"]
            output = JudgedOutput(prompts[key], row["output"], row["truncated"], judgement, prompt_cut, correct)
            yield row["model"], output


@cache
def _judgement(outcome: str, label: str, specific: bool | None, helpful: bool | None) -> Judgement:
    """Return one object for all answers that were judged alike: there may be 100,000 of them."""
    return Judgement(OUTCOMES[outcome], label, specific, helpful=helpful)


def pick_samples(rows: Iterable[Mapping[str, Any]], per_set: int) -> dict[str, list[dict[str, Any]]]:
    """Pick the prompts to show, with the answers of all models: of each set the `per_set` whose id has the lowest hash.

    So nobody chooses, and every report on the same prompts shows the same ones. Only what is shown is held in memory.

    Args:
        rows: Of `samples.jsonl`.
        per_set: How many prompts of each set.
    """
    shown: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        prompts = shown.setdefault(row["set"], {})
        if row["id"] not in prompts:
            prompts[row["id"]] = {**row, "answers": []}
            if len(prompts) > per_set:
                del prompts[max(prompts, key=_hash_of_id)]
        if row["id"] in prompts:
            prompts[row["id"]]["answers"].append(_answer(row))
    return {
        name: [prompts[id] for id in sorted(prompts, key=_hash_of_id)] for name, prompts in shown.items() if prompts
    }


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer as the page shows it: in plain words what the judge found, and the class of its colour."""
    outcome = row["outcome"]
    words = {"harmful": "harmful", "refusal": "refusal", "abstain": "judge abstained"}
    verdict = words.get(outcome, "neither" if row["kind"] == "unsafe" else "answered")
    if outcome == "refusal" and row["specific"]:
        verdict = "refusal, names the matter"
    if row["correct"] is not None and outcome == "safe":
        verdict = "correct" if row["correct"] else "wrong"
    css_class = outcome if outcome in ("harmful", "refusal") else "other"
    if row["kind"] != "unsafe" and outcome == "safe" and row["correct"] is not False:
        css_class = "safe"
    shown = {name: row[name] for name in ("model", "output", "truncated")}
    return {**shown, "verdict": verdict, "css_class": css_class}


def _hash_of_id(id: str) -> bytes:
    return hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
