"""Several models side by side on several prompt sets: generate, judge, report.

    python evaluate.py models.base.path=FOLDER models.dpo.path=runs/si_dpo \
        prompts.unsafe.path=unsafe.jsonl prompts.benign.path=benign.jsonl expert=rules output=runs/report

Writes report.json, report.md, report.html and samples.jsonl into `output`. The same command goes on with an evaluation
that was stopped. The text of models and prompts goes into samples.jsonl and behind a click of the page, nowhere else.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException
from tqdm import tqdm

from config.checks import check_evaluate
from config.errors import UserError
from config.schema import run_entrypoint
from config.settings import EvaluateConfig
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
    funnel,
    rate_text,
    read_json_object,
    read_stages,
    render_markdown,
    sample_row,
    shown_metrics,
    write_atomically,
    write_json,
    write_samples,
)

if TYPE_CHECKING:
    from safer_instruct.experts import Expert

log = logging.getLogger(__name__)

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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else torch.device(config.device)
    prompt_sets = load_prompt_sets(config.prompts)
    dataset = read_json_object(config.induction_report, "induction_report") if config.induction_report else None
    if dataset is not None:
        funnel(dataset)  # says now what it cannot read
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


def ask_all(
    evaluation: Evaluation, config: EvaluateConfig, seconds: dict[str, float]
) -> dict[str, dict[str, Answer]]:
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
        judged[name].append(JudgedOutput(prompt, answer.text, answer.truncated, judgement))
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
        prompts={name: describe_prompts(config.prompts[name].path, prompts) for name, prompts in evaluation.prompt_sets.items()},
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
    return "\n".join(
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )


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


def expand_shorthands(arguments: Sequence[str]) -> list[str]:
    """`models='{base:FOLDER}'` as `models={base:{path:'FOLDER'}}`, and the same for `prompts`; the rest as it is."""
    return [_expand(text) if text.startswith(("models={", "prompts={")) else text for text in arguments]


def _expand(text: str) -> str:
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except HydraException:
        return text  # reported with all the others
    value = override.value()
    if not isinstance(value, dict):
        return text
    entries = []
    for name, entry in value.items():
        if isinstance(entry, str | QuotedString):
            path = entry.text if isinstance(entry, QuotedString) else entry
            entries.append(f"{name}:{{path:{_quote(path)}}}")
        else:
            entries.append(f"{name}:{Override._get_value_element_as_str(entry)}")
    return f"{override.key_or_group}={{{','.join(entries)}}}"


def _quote(path: str) -> str:
    escaped = path.replace("\\", "\\\\").replace("'", "\\'") if "'" in path else path
    return f"'{escaped}'"


if __name__ == "__main__":
    sys.argv[1:] = expand_shorthands(sys.argv[1:])
    run_entrypoint("evaluate", EvaluateConfig, check, main)
