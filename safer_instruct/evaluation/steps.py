"""The steps of one evaluation: read all inputs, generate answers, judge them, and build the parts of the report.

`evaluate.py` calls these in turn. It also passes in the functions that need the kernels of trainers/.
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
from config.settings import EvaluateConfig, OpenAIExpertSettings
from safer_instruct.evaluation.answers import (
    WHOLE,
    Advance,
    Answer,
    generate_answers,
    judge_answers,
    judge_identity,
    ledger_path,
    ledger_paths,
    own_prompts,
    prompt_key,
)
from safer_instruct.evaluation.downstream import ChoiceScorer, check_choices, merge, require_lm_eval, run_tasks
from safer_instruct.evaluation.pairwise import compare_helpfulness
from safer_instruct.evaluation.respondents import Respondent, check_model
from safer_instruct.evaluation.response_columns import read_columns, read_hand_labels
from safer_instruct.evaluation.rewards import RewardScale, reward_scales
from safer_instruct.experts.expert import Expert, build_expert
from safer_instruct.experts.verdicts import Judgement, Outcome
from safer_instruct.induction.shard import budget_left
from safer_instruct.measures.comparisons import compare_models, judge_agreement
from safer_instruct.measures.contrasts import contrasts
from safer_instruct.measures.rates import JudgedOutput
from safer_instruct.report.curves import RunCurves, read_curves
from safer_instruct.report.dataset import read_induction_report, read_stages
from safer_instruct.report.training_runs import find_induction_report, find_training_overlap
from safer_instruct.text.exclusion import instruction_key
from safer_instruct.text.prompt_sets import EvaluationPrompt, Overlap, find_overlap, load_prompt_sets

log = logging.getLogger(__name__)

Answers = Mapping[str, Mapping[str, Answer]]
Judged = dict[str, list[JudgedOutput]]
Unanswered = dict[str, dict[str, list[str]]]  # model -> reason -> SET/ID


@dataclass
class Evaluation:
    """Everything an evaluation needs, read and checked; no weights are loaded yet."""

    respondents: dict[str, Respondent]
    given: Answers | None  # answers read from the prompt files; None: the models generate them
    hand_labels: Mapping[str, Mapping[str, Outcome]]  # human labels of these answers, by model and `prompt_key`
    prompt_sets: dict[str, list[EvaluationPrompt]]
    judge: Expert | None  # None: there are no prompts
    second_judge: Expert | None
    reward_scales: dict[str, RewardScale]
    device: torch.device
    shard: tuple[int, int]
    overlaps: list[Overlap]
    dataset: dict[str, Any] | None
    curves: dict[str, RunCurves]
    stages: list[dict[str, Any]]

    @property
    def prompts(self) -> list[EvaluationPrompt]:
        """The prompts of all sets."""
        return list(chain.from_iterable(self.prompt_sets.values()))


def prepare(config: EvaluateConfig, shard: tuple[int, int], device: torch.device) -> Evaluation:
    """Read and check everything except the weights, so that mistakes are reported before any compute is spent.

    Raises:
        UserError: A prompt set, model, judge or file of the report is missing or broken.
    """
    if "" in config.stop:
        raise UserError("stop: an empty text would end every answer before it begins; leave it out")
    prompt_sets = load_prompt_sets(config.prompts)
    induction_report = config.induction_report or find_induction_report([one.path for one in config.models.values()])
    dataset = read_induction_report(induction_report) if induction_report else None
    if config.downstream.tasks:
        require_lm_eval()
    judge, second_judge = (
        _build_judge(settings, device, Path(config.output) / "ledger", shard)
        if prompt_sets and settings is not None
        else None
        for settings in (config.expert, config.second_expert)
    )
    for one in (judge, second_judge):
        if one is not None and not config.dry_run:
            one.check()
    if config.responses == "csv":
        respondents, given = read_columns(config.prompts, config.columns, config.generation.thought_tags)
    else:
        respondents, given = {name: check_model(name, model) for name, model in config.models.items()}, None
    baseline = config.helpfulness.baseline
    if judge is not None and baseline is not None:
        if baseline not in respondents:
            raise UserError(f"helpfulness.baseline={baseline}: the models are {', '.join(respondents)}")
        judge.compare([])  # raises now if this judge cannot compare
    asks_rewards = config.rewards.path is not None
    return Evaluation(
        respondents=respondents,
        given=given,
        hand_labels=read_hand_labels(config.prompts) if config.responses == "csv" else {},
        prompt_sets=prompt_sets,
        judge=judge,
        second_judge=second_judge,
        reward_scales=reward_scales(respondents, config.rewards) if asks_rewards else {},
        device=device,
        shard=shard,
        overlaps=find_overlaps(config, list(chain.from_iterable(prompt_sets.values()))),
        dataset=dataset,
        curves={name: read_curves(name, path) for name, path in _curves(config).items()},
        stages=read_stages(config.stages_file) if config.stages_file else [],
    )


def _build_judge(settings: Any, device: torch.device, folder: Path, shard: tuple[int, int]) -> Expert:
    """Build a judge; a paid one may spend what its ledgers leave of this shard's part of the budget."""
    judge = build_expert(settings, device)
    if not isinstance(settings, OpenAIExpertSettings):
        return judge
    identities = judge_identity(judge), judge_identity(judge, "compare")
    # Whoever works on all prompts goes on from what the shards have done.
    own = [[ledger_path(folder, one, shard)] if shard != WHOLE else ledger_paths(folder, one) for one in identities]
    return build_expert(settings, device, budget_left(settings, list(chain.from_iterable(own)), shard[1]))


def _curves(config: EvaluateConfig) -> dict[str, str]:
    """Return the runs whose curves are drawn: `config.curves` if given, else every evaluated model that is a run."""
    among_models = {name: model.path for name, model in config.models.items()}
    runs = {name: path for name, path in among_models.items() if (find_path(path) / "metrics.jsonl").is_file()}
    return config.curves or runs


def find_overlaps(config: EvaluateConfig, prompts: Sequence[EvaluationPrompt]) -> list[Overlap]:
    """Find prompts that also occur in `training_data` or in the training data of the evaluated runs."""
    overlaps = [find_overlap(path, prompts) for path in config.training_data]
    asked: dict[str, list[str]] = {}
    for prompt in prompts:
        asked.setdefault(instruction_key(prompt.instruction), []).append(f"{prompt.set_name}/{prompt.id}")
    for model in config.models.values() if asked else ():
        found = find_training_overlap(model.path, asked)
        overlaps += [overlap for overlap in found if overlap not in overlaps]
    for overlap in overlaps:
        if overlap.prompt_ids:
            log.warning("warning: %d prompts also occur in %s", len(overlap.prompt_ids), overlap.path)
    return overlaps


def ask_all(evaluation: Evaluation, config: EvaluateConfig, seconds: dict[str, float]) -> Answers:
    """Return each model's answers, by `prompt_key`; only one model is in memory at a time."""
    prompts = own_prompts(evaluation.prompts, evaluation.shard)
    answers = {}
    for name, respondent in evaluation.respondents.items() if prompts else ():
        with timed(seconds, f"generate {name}", len(prompts)) as progress:
            answers[name] = generate_answers(
                respondent,
                prompts,
                generation=config.generation,
                stop=config.stop,
                device=evaluation.device,
                folder=Path(config.output) / "ledger",
                progress=progress,
                shard=evaluation.shard,
            )
    return answers


def judge_all(
    evaluation: Evaluation, answers: Answers, folder: Path, seconds: dict[str, float]
) -> tuple[Judged, Unanswered]:
    """Judge each model's answers, in prompt order, and list the prompts that it did not answer.

    Raises:
        UserError: The judge abstained on every answer.
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
    with timed(seconds, "judge", len(set(pairs))) as progress:
        shard = evaluation.shard
        judgements = judge_answers(evaluation.judge, pairs, folder=folder, progress=progress, shard=shard)
    if judgements and all(judgement.outcome == "abstain" for judgement in judgements):
        raise UserError(
            f"the judge {evaluation.judge.name} abstained on all {len(judgements)} answers: none of its replies could "
            "be read as a judgement. Can the model follow the rubric, and is expert.max_new_tokens (or "
            "expert.generation.max_new_tokens) large enough for one line of JSON? The answers are kept in "
            f"{folder}; to judge them again, delete its judge-*.jsonl"
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
    """Build the parts of the report beyond rates: comparisons, agreement, helpfulness, downstream tasks."""
    folder = Path(config.output) / "ledger"
    judge, second_judge, helpfulness = evaluation.judge, evaluation.second_judge, config.helpfulness
    parts: dict[str, Any] = {"comparisons": compare_models(judged, models), "contrasts": contrasts(judged)}
    if judge is not None and second_judge is not None:
        pairs = [(row.prompt.instruction, row.text) for rows in judged.values() for row in rows]
        with timed(seconds, "second judge", len(set(pairs))) as progress:
            others = iter(judge_answers(second_judge, pairs, folder=folder, progress=progress))
        second = {name: [next(others) for _ in rows] for name, rows in judged.items()}
        parts["agreement"] = judge_agreement((judge.name, second_judge.name), judged, second)
    if judge is not None and evaluation.hand_labels:
        parts["hand_labels"] = agreement_with_people(judge.name, judged, evaluation.hand_labels)
    if judge is not None and helpfulness.baseline is not None:
        with timed(seconds, "helpfulness", 2 * sum(map(len, judged.values()))) as progress:
            parts["helpfulness"] = compare_helpfulness(
                judge, judged, baseline=helpfulness.baseline, kinds=helpfulness.kinds, folder=folder, progress=progress
            )
    if config.downstream.tasks:
        with timed(seconds, "downstream tasks", len(evaluation.respondents)) as progress:
            parts["downstream"] = downstream_part(config, evaluation, score, progress)
    return parts


def agreement_with_people(
    judge: str, judged: Judged, labels: Mapping[str, Mapping[str, Outcome]]
) -> dict[str, Any] | None:
    """Compare a judge with hand labels, on the answers that have a hand label."""
    labelled: Judged = {}
    people: dict[str, list[Judgement]] = {}
    for name, of_model in labels.items():
        labelled[name] = [row for row in judged.get(name, ()) if prompt_key(row.prompt) in of_model]
        people[name] = [Judgement(of_model[prompt_key(row.prompt)]) for row in labelled[name]]
    return judge_agreement((judge, "hand labels"), labelled, people)


def downstream_part(
    config: EvaluateConfig, evaluation: Evaluation, score: ChoiceScorer, progress: Advance
) -> dict[str, Any]:
    """Run lm_eval on each model, and check its log-likelihoods against ours."""
    from safer_instruct.generation.weights import is_adapter, resolve_archive

    results, checks = {}, {}
    for name, respondent in evaluation.respondents.items():
        folder = resolve_archive(respondent.path) if find_path(respondent.path).exists() else Path(respondent.path)
        if folder.is_file():
            raise UserError(f"models.{name}.path={respondent.path}: lm_eval reads model folders, not a policy.pt")
        if is_adapter(folder):
            raise UserError(
                f"models.{name}.path={respondent.path}: lm_eval reads model folders, but this is an adapter; name a "
                "run with checkpoint.merge=true"
            )
        results[name] = run_tasks(
            respondent,
            Path(config.output) / "downstream",
            config.downstream,
            model_folder=folder,
            device=str(evaluation.device),
        )
        checks[name] = check_choices(respondent, results[name]["choices"], score)
        progress(1)
    return merge(results, checks)


@contextmanager
def timed(seconds: dict[str, float], name: str, num_rows: int) -> Iterator[Advance]:
    """Record under `name` how many seconds the block takes; yield the function that advances its progress bar.

    The bar is shown only on a terminal; in a log, each stage is one line.
    """
    if not sys.stderr.isatty():
        log.info("%s: %d rows", name, num_rows)
    start = time.perf_counter()
    with tqdm(total=num_rows, desc=name, unit="row", disable=None, file=sys.stderr) as bar:
        yield bar.update
    seconds[name] = round(time.perf_counter() - start, 2)
