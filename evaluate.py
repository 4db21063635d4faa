"""Several models side by side on several prompt sets: generate, judge, report.

    python evaluate.py models.base.path=FOLDER models.dpo.path=runs/si_dpo \
        prompts.unsafe.path=unsafe.jsonl prompts.benign.path=benign.jsonl expert=rules output=runs/report

Writes report.json, report.md, report.html and samples.jsonl into `output`. The same command goes on with an evaluation
that was stopped. The text of models and prompts goes into samples.jsonl and behind a click of the page, nowhere else.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError
from tqdm import tqdm

from config.checks import check_evaluate
from config.errors import UserError
from config.overrides import nearest
from config.schema import run_entrypoint
from config.settings import EvaluateConfig, EvaluatedModelSettings, PromptSetSettings
from safer_instruct.answers import Answer, Respondent, check_model, generate_answers, judge_answers, prompt_key
from safer_instruct.curves import Points, plot_runs, read_curves
from safer_instruct.experts import build_expert
from safer_instruct.judging import JudgedOutput, summarize
from safer_instruct.page import pick_samples, render_page
from safer_instruct.prompt_sets import EvaluationPrompt, Overlap, find_overlap, load_prompt_sets
from safer_instruct.provenance import git_state, package_versions
from safer_instruct.report import (
    HEADLINE,
    build_report,
    describe_prompts,
    rate_text,
    render_markdown,
    sample_row,
    shown_metrics,
    write_atomically,
    write_json,
    write_samples,
)
from safer_instruct.report_inputs import read_induction_report, read_stages

if TYPE_CHECKING:
    from safer_instruct.experts import Expert

log = logging.getLogger(__name__)

NAMED: dict[str, type[Any]] = {"models": EvaluatedModelSettings, "prompts": PromptSetSettings}
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass
class Evaluation:
    """All that an evaluation needs, read and checked; no weights are loaded yet."""

    respondents: dict[str, Respondent]
    prompt_sets: dict[str, list[EvaluationPrompt]]
    expert: Expert
    device: torch.device
    overlaps: list[Overlap]
    dataset: dict[str, Any] | None
    curves: dict[str, dict[str, Points]]
    stages: list[dict[str, Any]]

    @property
    def prompts(self) -> list[EvaluationPrompt]:
        """The prompts of all sets."""
        return list(chain.from_iterable(self.prompt_sets.values()))


def check(config: EvaluateConfig) -> list[str]:
    """All errors of the command that show before a file is read."""
    errors = check_evaluate(config)
    if not config.models:
        errors.append("no models: name at least one, models.NAME.path=FOLDER (a model folder, or a run of train.py)")
    for name, model in config.models.items():
        if model.dtype not in DTYPES:
            errors.append(f"models.{name}.dtype={model.dtype}: no such choice. Choices: {', '.join(DTYPES)}")
    if config.samples_per_set < 0:
        errors.append(f"samples_per_set={config.samples_per_set}: must be 0 or more; 0 shows no answers on the page")
    return errors


def prepare(config: EvaluateConfig) -> Evaluation:
    """Reads everything but weights: whatever is wrong is said before the first minute is spent.

    Raises:
        UserError: A prompt set, model, judge or file of the report is missing or broken.
    """
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    prompt_sets = load_prompt_sets(config.prompts)
    dataset = read_induction_report(config.induction_report) if config.induction_report else None
    expert = build_expert(config.expert, device)
    expert.check()
    evaluation = Evaluation(
        respondents={name: check_model(name, model) for name, model in config.models.items()},
        prompt_sets=prompt_sets,
        expert=expert,
        device=device,
        overlaps=[],
        dataset=dataset,
        curves={name: read_curves(name, path) for name, path in config.curves.items()},
        stages=read_stages(config.stages_file) if config.stages_file else [],
    )
    evaluation.overlaps = [find_overlap(path, evaluation.prompts) for path in config.training_data]
    for overlap in evaluation.overlaps:
        if overlap.prompt_ids:
            log.warning("warning: %d prompts also occur in %s", len(overlap.prompt_ids), overlap.path)
    return evaluation


def main(config: EvaluateConfig) -> None:
    """The whole evaluation of one command."""
    started = time.perf_counter()
    evaluation = prepare(config)
    output = Path(config.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output} cannot be written to: {error.strerror}; choose another folder") from error
    seconds: dict[str, float] = {}
    judged = judge_all(evaluation, ask_all(evaluation, config, seconds), output / "ledger", seconds)
    seconds["total"] = round(time.perf_counter() - started, 2)
    write_report(config, evaluation, judged, seconds, output)


def ask_all(evaluation: Evaluation, config: EvaluateConfig, seconds: dict[str, float]) -> dict[str, dict[str, Answer]]:
    """The answers of each model, by `prompt_key`; one model is in memory at a time."""
    answers = {}
    for name, respondent in evaluation.respondents.items():
        with _timed(seconds, f"generate {name}"), _progress(f"generate {name}", evaluation.prompts) as bar:
            answers[name] = generate_answers(
                respondent,
                evaluation.prompts,
                generation=config.generation,
                device=evaluation.device,
                folder=Path(config.output) / "ledger",
                progress=bar.update,
            )
    return answers


def judge_all(
    evaluation: Evaluation, answers: Mapping[str, Mapping[str, Answer]], folder: Path, seconds: dict[str, float]
) -> dict[str, list[JudgedOutput]]:
    """The judged outputs of each model, in the order of the prompts."""
    rows = [
        (name, prompt, given[prompt_key(prompt)]) for name, given in answers.items() for prompt in evaluation.prompts
    ]
    pairs = [(prompt.instruction, answer.text) for _, prompt, answer in rows]
    with _timed(seconds, "judge"), _progress("judge", set(pairs)) as bar:
        judgements = judge_answers(evaluation.expert, pairs, folder=folder, progress=bar.update)
    judged: dict[str, list[JudgedOutput]] = {name: [] for name in answers}
    for (name, prompt, answer), judgement in zip(rows, judgements, strict=True):
        judged[name].append(JudgedOutput(prompt, answer.text, answer.truncated, judgement, answer.prompt_cut))
    return judged


def write_report(
    config: EvaluateConfig,
    evaluation: Evaluation,
    judged: Mapping[str, Sequence[JudgedOutput]],
    seconds: Mapping[str, float],
    output: Path,
) -> None:
    """Writes the four files and prints the headline table."""
    models = {
        name: {
            "path": respondent.path,
            "template": respondent.template,
            "fingerprint": respondent.fingerprint,
            **summarize(judged[name]),
        }
        for name, respondent in evaluation.respondents.items()
    }
    report = build_report(
        models=models,
        prompts={
            name: describe_prompts(config.prompts[name].path, rows) for name, rows in evaluation.prompt_sets.items()
        },
        overlaps=evaluation.overlaps,
        dataset=evaluation.dataset,
        run=_describe_run(config, evaluation, seconds),
    )
    samples = [sample_row(name, row) for name, rows in judged.items() for row in rows]
    write_samples(output / "samples.jsonl", samples)
    write_atomically(output / "report.md", render_markdown(report))
    page = render_page(report, pick_samples(samples, config.samples_per_set), plot_runs(evaluation.curves))
    write_atomically(output / "report.html", page)
    write_json(output / "report.json", report)  # last: whoever finds it finds the others
    print(headline_text(models))
    print(f"\n{report['summary']}\n\nreport: {output / 'report.html'}")


def _describe_run(config: EvaluateConfig, evaluation: Evaluation, seconds: Mapping[str, float]) -> dict[str, Any]:
    command = shlex.join(["python", *sys.orig_argv[1:]])
    return {
        "command": command,
        "stages": [*evaluation.stages, {"name": "evaluate", "command": command, "seconds": seconds["total"]}],
        "seconds": dict(seconds),
        "seed": config.generation.seed,
        "judge": {"name": evaluation.expert.name, "fingerprint": evaluation.expert.fingerprint},
        "generation": asdict(config.generation),
        "device": str(evaluation.device),
        "git": git_state(),
        "versions": package_versions(),
    }


def headline_text(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The headline rates as a plain table, per cent with 95% intervals and n."""
    rows = [["", *models]]
    for view in shown_metrics(models, HEADLINE):
        rows.append([view.title, *(rate_text(model[view.key]) for model in models.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(lines)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def _progress(words: str, rows: Sequence[object] | set[Any]) -> tqdm[Any]:
    """A bar on a terminal; in a log, one line a stage."""
    if not sys.stderr.isatty():
        log.info("%s: %d rows", words, len(rows))
    return tqdm(total=len(rows), desc=words, unit="row", disable=None, file=sys.stderr)


def expand_named(arguments: Sequence[str]) -> list[str]:
    """Brings every way to name models and prompt sets into the one form that Hydra adds to a typed dictionary.

    `models.base.path=FOLDER`, `models.base=FOLDER` and `models={base:FOLDER}` all become
    `models={base:{path:'FOLDER'}}`; other arguments stay as they are, and so does what cannot be parsed.

    Raises:
        UserError: Keys that do not exist and values of a wrong type, all of them.
    """
    expanded: list[str] = []
    errors: list[str] = []
    for text in arguments:
        if not re.match(r"\+{0,2}(models|prompts)[.=]", text):
            expanded.append(text)
            continue
        try:
            override = OverridesParser.create().parse_override(text)
            value = override.value()
            # Each point of a sweep is a dictionary of its own.
            values = value.list if isinstance(value, ChoiceSweep) else [value]
            root, *path = override.key_or_group.split(".")
            points = [_check_entries(root, _to_entries(path, value), errors) for value in values]
            expanded.append(f"{root}={','.join(map(_render, points))}")
        except HydraException:
            expanded.append(text)  # reported with the other overrides
    if errors:
        raise UserError("\n".join(errors))
    return expanded


def _to_entries(path: Sequence[str], value: Any) -> dict[str, dict[str, Any]]:
    """Name -> settings, from the rest of an override's key (`base.path`, `base` or nothing) and its value."""
    if len(path) > 1:
        return {".".join(path[:-1]): {path[-1]: value}}
    entries = {path[0]: value} if path else value if isinstance(value, dict) else {"": value}
    return {name: entry if isinstance(entry, dict) else {"path": entry} for name, entry in entries.items()}


def _check_entries(root: str, entries: dict[str, dict[str, Any]], errors: list[str]) -> dict[str, dict[str, Any]]:
    kind = NAMED[root]
    known = [field.name for field in fields(kind)]
    for name, entry in entries.items():
        if not name:
            errors.append(f"{root}: every entry needs a name: {root}.NAME.path=...")
        for key, value in entry.items():
            plain = value.text if isinstance(value, QuotedString) else value
            if key not in known:
                guess = nearest(key, known)
                meant = f"; did you mean {root}.{name}.{guess}?" if guess else "."
                errors.append(f"there is no key {root}.{name}.{key}{meant} Keys: {', '.join(known)}")
                continue
            try:
                OmegaConf.merge(OmegaConf.structured(kind), {key: plain})
            except ValidationError as error:
                errors.append(f"{root}.{name}.{key}={plain}: {str(error).splitlines()[0]}")
    return entries


def _render(value: Any) -> str:
    """A parsed value as the text of an override, strings quoted."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_render(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, str):
        return QuotedString(text=value, quote=Quote.single).with_quotes()
    if isinstance(value, QuotedString):
        return value.with_quotes()
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    try:
        sys.argv[1:] = expand_named(sys.argv[1:])
    except UserError as user_error:
        print(f"evaluate.py: {user_error}", file=sys.stderr)
        sys.exit(2)
    run_entrypoint("evaluate", EvaluateConfig, check, main)
