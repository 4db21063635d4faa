"""`dry_run` of an evaluation: estimate how much each model would generate, and how much the judges would judge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from config.settings import EvaluateConfig
from safer_instruct.evaluation.answers import answers_identity, judge_identity, ledger_paths, own_prompts, prompt_key
from safer_instruct.evaluation.steps import Evaluation
from safer_instruct.experts.expert import Expert
from safer_instruct.experts.prompts import ROLES
from safer_instruct.induction.forecast import SAMPLE, Step, asked_expert, asked_model, measure, render_forecast
from safer_instruct.text.prompts import render_prompt


def forecast_evaluation(config: EvaluateConfig, evaluation: Evaluation) -> str:
    """Return the table of models and judges; it leaves out lm_eval tasks and implicit rewards."""
    from safer_instruct.generation.models import load_tokenizer

    prompts = own_prompts(evaluation.prompts, evaluation.shard)
    sample = prompts[:: max(1, len(prompts) // SAMPLE)]
    wanted = set(map(prompt_key, prompts))
    num_answers = len(prompts) * len(evaluation.respondents)

    folder = Path(config.output) / "ledger"

    def judging(judge: Expert | None, settings: object, name: str) -> Iterator[Step]:
        if judge is not None:
            texts = [ROLES["judge"].render(prompt.instruction, "").text for prompt in sample]
            asked, done = asked_expert(settings), measure(ledger_paths(folder, judge_identity(judge)))
            yield Step(name, num_answers, texts, asked, done, True, 1, config.generation.max_new_tokens)

    def steps() -> Iterator[Step]:
        for name, one in evaluation.respondents.items() if evaluation.given is None else ():
            tokenizer = load_tokenizer(one.model)
            texts = [
                render_prompt(one.template, prompt.instruction, tokenizer=tokenizer, system=one.system).text
                for prompt in sample
            ]
            done = measure(ledger_paths(folder, answers_identity(one, config.generation)), wanted.__contains__)
            yield Step(f"generate {name}", len(prompts), texts, asked_model(one.model, config.generation), done)
        yield from judging(evaluation.judge, config.expert, "judge")
        yield from judging(evaluation.second_judge, config.second_expert, "judge, the second")
        compared = [prompt for prompt in prompts if prompt.kind in config.helpfulness.kinds]
        if config.helpfulness.baseline is not None and evaluation.judge is not None:
            texts = [ROLES["compare"].render(prompt.instruction, "", "").text for prompt in sample]
            done = measure(ledger_paths(folder, judge_identity(evaluation.judge, "compare")))
            rows = 2 * len(compared) * (len(evaluation.respondents) - 1)  # each pair of answers in both orders
            asked, unwritten = asked_expert(config.expert), 2 * config.generation.max_new_tokens
            yield Step("compare", rows, texts, asked, done, True, 1, unwritten)

    index, count = evaluation.shard
    parts = {
        "the tasks of downstream.tasks": config.downstream.tasks,
        "the log-probabilities of rewards.path": config.rewards.path,
    }
    notes = [f"not counted: {what}" for what, is_asked in parts.items() if is_asked]
    head = f"{config.output}, shard {index} of {count}: {len(prompts)} prompts, {len(evaluation.respondents)} models"
    return "\n".join([head, render_forecast(list(steps()), config.rate), *notes])
