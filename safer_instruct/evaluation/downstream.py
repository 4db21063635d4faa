"""Run downstream tasks with lm_eval, an optional extra, in a separate process.

It runs as `python -P -m lm_eval`: without `-P`, our top-level `evaluate.py` would shadow the package `evaluate` that
lm_eval imports.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.errors import UserError, first_line
from config.files import write_text
from config.paths import find_path
from config.reading import read_mapping
from config.settings import DownstreamSettings
from safer_instruct.evaluation.respondents import Respondent
from safer_instruct.text.examples import short_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The tasks that alignment papers usually report to show that the model has not forgotten anything.
TASK_LISTS = {
    "knowledge": ("mmlu", "arc_easy", "arc_challenge", "truthfulqa_mc2"),
    "common_sense": ("hellaswag", "piqa", "winogrande"),
    "reading": ("boolq", "race", "openbookqa"),
}
INSTALL = 'pip install "lm_eval[hf]"'
METRICS = ("acc", "acc_norm", "exact_match", "f1", "mc2")  # reported for each task that has them
CHECKED_CHOICES = 32  # log-likelihoods that we recompute to check lm_eval's
TOLERANCE = 1e-4  # nats, for choices of up to 100 nats: float32 has 7 digits
ROUNDING = {"bfloat16": 2**-7, "float16": 2**-10}  # a unit in the last place of a number between 1 and 2
LOGITS = 16  # a typical size of logits: rounding them is the smallest error that any log-likelihood has
ERROR_LINES = 12

# (model, (context, continuation) pairs) -> log-likelihoods in nats; evaluate.py passes it in, with the trainers/ kernel
ChoiceScorer = Callable[[Respondent, Sequence[tuple[str, str]]], list[float]]


def require_lm_eval() -> None:
    """Raise a UserError with the install command if lm_eval is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(f"downstream.tasks needs lm_eval, which is not installed here: {INSTALL}")


def task_names(settings: DownstreamSettings) -> list[str]:
    """Return the requested lm_eval tasks, with our lists expanded and duplicates removed."""
    return list(dict.fromkeys(name for entry in settings.tasks for name in TASK_LISTS.get(entry, (entry,))))


def run_tasks(
    respondent: Respondent, folder: Path, settings: DownstreamSettings, *, model_folder: Path, device: str
) -> dict[str, Any]:
    """Return the results of one model; a finished run of the same weights and settings is reused.

    Returns:
        `{"tasks": {TASK: {METRIC: {"value", "stderr"}}}, "versions": {TASK: n}, "choices": [...]}`; choices are some
        (context, continuation, log-likelihood) of multiple-choice tasks.

    Raises:
        UserError: lm_eval failed; the message holds its last lines.
    """
    identity = {**asdict(settings), "tasks": task_names(settings), "model": respondent.fingerprint}
    identity["include_path"] = _content(settings.include_path)
    digest = short_hash(json.dumps(identity, sort_keys=True), 6)
    done = folder / f"{digest}.json"
    if not done.is_file():
        work = folder / digest
        shutil.rmtree(work, ignore_errors=True)  # left over from a killed process
        _run(_command(respondent, settings, model_folder, device, work))
        try:
            results = _read_results(work)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{work}: lm_eval wrote no results that can be read ({first_line(error)})") from error
        write_text(done, json.dumps(results))
        shutil.rmtree(work)
    return read_mapping(done, "delete it to have the tasks run again")


def _content(include_path: str | None) -> str | None:
    """Return the hash of a folder of tasks."""
    if include_path is None:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(file for file in find_path(include_path).rglob("*") if file.is_file()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _command(
    respondent: Respondent, settings: DownstreamSettings, model_folder: Path, device: str, output: Path
) -> list[str]:
    arguments = f"pretrained={model_folder},dtype={respondent.model.policy_dtype}"
    command = [sys.executable, "-P", "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments]
    command += ["--tasks", ",".join(task_names(settings)), "--device", device, "--output_path", str(output)]
    command += ["--batch_size", str(settings.batch_size), "--log_samples"]
    include_path = None if settings.include_path is None else find_path(settings.include_path).resolve()
    optional = {"include_path": include_path, "num_fewshot": settings.num_fewshot, "limit": settings.limit}
    for name, value in optional.items():
        command += [f"--{name}", str(value)] if value is not None else []
    return command


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        last = "\n  ".join(done.stdout.strip().splitlines()[-ERROR_LINES:])
        raise UserError(
            f"lm_eval ended with status {done.returncode}; its last lines:\n  {last}\nFor your own tasks, set "
            "downstream.include_path=FOLDER. Without a network, the data that a task downloads must already be in the "
            "cache of `datasets`"
        )


def _read_results(folder: Path) -> dict[str, Any]:
    (file,) = sorted(folder.rglob("results_*.json"))[-1:]
    results = json.loads(file.read_text(encoding="utf-8"))
    tasks: dict[str, dict[str, Any]] = {}
    for task, values in results["results"].items():
        tasks[task] = {}
        for name in METRICS:
            value, stderr = values.get(f"{name},none"), values.get(f"{name}_stderr,none")
            if _is_told(value):
                tasks[task][name] = {"value": value, "stderr": stderr if _is_told(stderr) else None}
    logged = chain.from_iterable(map(_logged_choices, sorted(folder.rglob("samples_*.jsonl"))))
    choices = list(islice(logged, CHECKED_CHOICES))
    return {"tasks": tasks, "versions": results.get("versions", {}), "choices": choices}


def _is_told(value: Any) -> bool:
    """Return whether lm_eval could tell a number; it writes "N/A" or NaN for what it cannot."""
    return isinstance(value, int | float) and math.isfinite(value)


def _logged_choices(samples: Path) -> Iterator[list[Any]]:
    """Yield (context, continuation, log-likelihood) from a file of logged samples; nothing for a generation task."""
    with samples.open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            for arguments, answers in zip(row["arguments"].values(), row["resps"], strict=True):
                if "arg_1" in arguments and isinstance(arguments["arg_1"], str):
                    yield [arguments["arg_0"], arguments["arg_1"], float(answers[0][0])]


def encode_choice(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and a choice, split as in lm_eval: spaces between them belong to the choice."""
    stripped = context.rstrip()
    whole = list(tokenizer.encode(context + continuation))
    start = len(tokenizer.encode(stripped))
    return whole[:start], whole[start:]


def check_choices(respondent: Respondent, choices: Sequence[Sequence[Any]], score: ChoiceScorer) -> dict[str, Any]:
    """Check lm_eval's log-likelihoods of choices against ours: `{"n", "largest_difference"}`, in nats.

    Raises:
        UserError: They differ by more than the rounding of the model's dtype, so one of the two programs computes
            something else.
    """
    pairs = [(context, continuation) for context, continuation, _ in choices if context]
    theirs = [logp for context, _, logp in choices if context]
    if not pairs:
        return {"n": 0, "largest_difference": None}
    differences = [abs(own - other) for own, other in zip(score(respondent, pairs), theirs, strict=True)]
    tolerance = choice_tolerance(respondent.model.policy_dtype, max(map(abs, theirs)))
    if not all(difference <= tolerance for difference in differences):  # written so that a NaN fails, too
        raise UserError(
            f"models.{respondent.name}: lm_eval's log-likelihoods of {len(pairs)} choices differ from those of this "
            f"program by up to {max(differences):.2g} nats (up to {tolerance:.1g} is rounding in "
            f"{respondent.model.policy_dtype}). Does the tokenizer belong to the model?"
        )
    return {"n": len(pairs), "largest_difference": max(differences)}


def choice_tolerance(dtype: str, largest: float) -> float:
    """Return how far rounding alone may move the log-likelihood of a choice, in nats.

    lm_eval rounds logits, log-probabilities and their sum to the dtype of the weights; our kernel sums in float64. With
    16 bits, the difference is one or two units in the last place of a logit and of the log-likelihood itself.

    `largest` is the largest absolute log-likelihood, in nats.
    """
    if dtype in ROUNDING:
        return 2 * ROUNDING[dtype] * (LOGITS + largest)
    return TOLERANCE * max(1.0, largest / 100)


def merge(results: Mapping[str, Mapping[str, Any]], checks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Build this part of the report: the tasks in order, each model's values, and the result of the check."""
    tasks = list(dict.fromkeys(task for result in results.values() for task in result["tasks"]))
    return {
        "tasks": tasks,
        "versions": {task: number for result in results.values() for task, number in result["versions"].items()},
        "models": {name: result["tasks"] for name, result in results.items()},
        "checked": {name: dict(check) for name, check in checks.items()},
    }
