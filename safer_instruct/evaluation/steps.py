"""One evaluation from its settings to what a report needs: read everything, ask the models, ask the judges.

`evaluate.py` calls these in turn, and brings what needs the kernels of trainers/.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from config.errors import UserError
from config.paths import find_path
from config.settings import EvaluateConfig
from safer_instruct.evaluation.answers import (
    Answer,
    Respondent,
    check_model,
    generate_answers,
    judge_answers,
    own_prompts,
    prompt_key,
)
from safer_instruct.evaluation.downstream import ChoiceScorer, check_choices, merge, require_lm_eval, run_tasks
from safer_instruct.evaluation.pairwise import compare_helpfulness
from safer_instruct.evaluation.response_columns import read_columns
from safer_instruct.experts.expert import Expert, build_expert
from safer_instruct.measures.comparisons import compare_models, judge_agreement
from safer_instruct.measures.rates import JudgedOutput
from safer_instruct.report.curves import Points, read_curves
from safer_instruct.report.dataset import read_induction_report, read_stages
from safer_instruct.report.training_runs import find_induction_report, find_training_overlap
from safer_instruct.text.prompt_sets import EvaluationPrompt, Overlap, find_overlap, load_prompt_sets

log = logging.getLogger(__name__)

Answers = Mapping[str, Mapping[str, Answer]]
Judged = dict[str, list[JudgedOutput]]
Unanswered = dict[str, dict[str, list[str]]]  # model -> reason -> SET/ID


@dataclass
class Evaluation:
    """All that an evaluation needs, read and checked; no weights are loaded yet."""

    respondents: dict[str, Respondent]
    given: Answers | None  # answers that the prompt files hold; None: the models are asked
    prompt_sets: dict[str, list[EvaluationPrompt]]
    judge: Expert | None  # None: there are no prompts
    second_judge: Expert | None
    device: torch.device
    shard: tuple[int, int]
    overlaps: list[Overlap]
    dataset: dict[str, Any] | None
    curves: dict[str, dict[str, Points]]
    stages: list[dict[str, Any]]

    @property
    def prompts(self) -> list[EvaluationPrompt]:
        """The prompts of all sets."""
        return list(chain.from_iterable(self.prompt_sets.values()))


def prepare(config: EvaluateConfig, shard: tuple[int, int]) -> Evaluation:
    """Reads everything but weights: whatever is wrong is said before the first minute is spent.

    Raises:
        UserError: A prompt set, model, judge or file of the report is missing or broken.
    """
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    prompt_sets = load_prompt_sets(config.prompts) if config.prompts else {}
    induction_report = config.induction_report or find_induction_report([one.path for one in config.models.values()])
    dataset = read_induction_report(induction_report) if induction_report else None
    if config.downstream.tasks:
        require_lm_eval()
    judge, second = (
        build_expert(settings, device) if prompt_sets and settings is not None else None
        for settings in (config.expert, config.second_expert)
    )
    for one in (one for one in (judge, second) if one is not None):
        one.check()
    if config.responses == "csv":
        respondents, given = read_columns(config.prompts, config.columns, config.generation.thought_tags)
    else:
        respondents, given = {name: check_model(name, model) for name, model in config.models.items()}, None
    baseline = config.helpfulness.baseline
    if judge is not None and baseline is not None:
        if baseline not in respondents:
            raise UserError(f"helpfulness.baseline={baseline}: the models are {', '.join(respondents)}")
        judge.compare([])
    evaluation = Evaluation(
        respondents=respondents,
        given=given,
        prompt_sets=prompt_sets,
        judge=judge,
        second_judge=second,
        device=device,
        shard=shard,
        overlaps=[],
        dataset=dataset,
        curves={name: read_curves(name, path) for name, path in _curves(config).items()},
        stages=read_stages(config.stages_file) if config.stages_file else [],
    )
    evaluation.overlaps = find_overlaps(config, evaluation.prompts)
    return evaluation


def _curves(config: EvaluateConfig) -> dict[str, str]:
    """The runs whose curves are drawn: those that are named, else those among the models."""
    among_models = {name: model.path for name, model in config.models.items()}
    runs = {name: path for name, path in among_models.items() if (find_path(path) / "metrics.jsonl").is_file()}
    return config.curves or runs


def find_overlaps(config: EvaluateConfig, prompts: Sequence[EvaluationPrompt]) -> list[Overlap]:
    """What the prompts share with the files that are named, and with what the evaluated runs were trained on."""
    overlaps = [find_overlap(path, prompts) for path in config.training_data]
    for model in config.models.values():
        found = find_training_overlap(model.path, prompts) if prompts else []
        overlaps += [overlap for overlap in found if overlap not in overlaps]
    for overlap in overlaps:
        if overlap.prompt_ids:
            log.warning("warning: %d prompts also occur in %s", len(overlap.prompt_ids), overlap.path)
    return overlaps


def ask_all(evaluation: Evaluation, config: EvaluateConfig, seconds: dict[str, float]) -> Answers:
    """The answers of each model, by `prompt_key`; one model is in memory at a time."""
    prompts = own_prompts(evaluation.prompts, evaluation.shard)
    answers = {}
    for name, respondent in evaluation.respondents.items() if prompts else ():
        with timed(seconds, f"generate {name}"), progress_bar(f"generate {name}", len(prompts)) as bar:
            answers[name] = generate_answers(
                respondent,
                prompts,
                generation=config.generation,
                stop=config.stop,
                device=evaluation.device,
                folder=Path(config.output) / "ledger",
                progress=bar.update,
                shard=evaluation.shard,
            )
    return answers


def judge_all(
    evaluation: Evaluation, answers: Answers, folder: Path, seconds: dict[str, float]
) -> tuple[Judged, Unanswered]:
    """The judged outputs of each model, in the order of the prompts, and the prompts that it has no answer to.

    Raises:
        UserError: The judge abstained on everything.
    """
    judged: Judged = {name: [] for name in evaluation.respondents}
    unanswered: Unanswered = {name: {} for name in evaluation.respondents}
    if evaluation.judge is None:
        return judged, unanswered
    rows = []
    prompts = own_prompts(evaluation.prompts, evaluation.shard)
    for name, given in answers.items():
        for prompt in prompts:
            answer = given[prompt_key(prompt)]
            if answer.error:
                unanswered[name].setdefault(answer.error, []).append(f"{prompt.set_name}/{prompt.id}")
            else:
                rows.append((name, prompt, answer))
    pairs = [(prompt.instruction, answer.text) for _, prompt, answer in rows]
    with timed(seconds, "judge"), progress_bar("judge", len(set(pairs))) as bar:
        shard = evaluation.shard
        judgements = judge_answers(evaluation.judge, pairs, folder=folder, progress=bar.update, shard=shard)
    if judgements and all(judgement.outcome == "abstain" for judgement in judgements):
        raise UserError(
            f"the judge {evaluation.judge.name} abstained on all {len(judgements)} answers: none of its replies could "
            "be read as a judgement. Is the model able to follow the rubric, and expert.max_new_tokens (or "
            "expert.generation.max_new_tokens) large enough for one line of JSON? The answers are kept in "
            f"{folder}; delete its judge-*.jsonl to have them judged again"
        )
    for (name, prompt, answer), judgement in zip(rows, judgements, strict=True):
        judged[name].append(JudgedOutput(prompt, answer.text, answer.truncated, judgement, answer.prompt_cut))
    return judged, unanswered


def build_parts(
    config: EvaluateConfig,
    evaluation: Evaluation,
    judged: Judged,
    models: Mapping[str, Mapping[str, Any]],
    seconds: dict[str, float],
    score: ChoiceScorer,
) -> dict[str, Any]:
    """What the report holds beyond rates: comparisons, agreement, helpfulness, downstream tasks."""
    folder = Path(config.output) / "ledger"
    parts: dict[str, Any] = {"comparisons": compare_models(judged, models)}
    if evaluation.judge is not None and evaluation.second_judge is not None:
        pairs = [(row.prompt.instruction, row.text) for rows in judged.values() for row in rows]
        with timed(seconds, "second judge"), progress_bar("second judge", len(set(pairs))) as bar:
            others = iter(judge_answers(evaluation.second_judge, pairs, folder=folder, progress=bar.update))
        second = {name: [next(others) for _ in rows] for name, rows in judged.items()}
        names = (evaluation.judge.name, evaluation.second_judge.name)
        parts["agreement"] = judge_agreement(names, judged, second)
    if evaluation.judge is not None and config.helpfulness.baseline is not None:
        with timed(seconds, "helpfulness"), progress_bar("helpfulness", 2 * sum(map(len, judged.values()))) as bar:
            parts["helpfulness"] = compare_helpfulness(
                evaluation.judge,
                judged,
                baseline=config.helpfulness.baseline,
                kinds=config.helpfulness.kinds,
                folder=folder,
                progress=bar.update,
            )
    if config.downstream.tasks:
        with timed(seconds, "downstream tasks"):
            parts["downstream"] = downstream_part(config, evaluation, score)
    return parts


def downstream_part(config: EvaluateConfig, evaluation: Evaluation, score: ChoiceScorer) -> dict[str, Any]:
    """The results of lm_eval for each model, whose log-likelihoods are compared with ours."""
    from safer_instruct.generation.models import resolve_archive

    results, checks = {}, {}
    for name, respondent in evaluation.respondents.items():
        folder = resolve_archive(respondent.path) if find_path(respondent.path).exists() else Path(respondent.path)
        if folder.is_file():
            raise UserError(f"models.{name}.path={respondent.path}: lm_eval reads model folders, not a policy.pt")
        results[name] = run_tasks(
            respondent,
            Path(config.output) / "downstream",
            config.downstream,
            model_folder=folder,
            device=str(evaluation.device),
        )
        checks[name] = check_choices(respondent, results[name]["choices"], score)
    return merge(results, checks)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note under `name` how many seconds the block takes."""
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def progress_bar(words: str, num_rows: int) -> tqdm[Any]:
    """A bar on a terminal; in a log, one line a stage."""
    if not sys.stderr.isatty():
        log.info("%s: %d rows", words, num_rows)
    return tqdm(total=num_rows, desc=words, unit="row", disable=None, file=sys.stderr)
