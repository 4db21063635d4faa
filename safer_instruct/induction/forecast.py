"""`dry_run` of an induction or an evaluation: what is left to do and its cost, without loading or calling a model.

Rows are counted. Tokens and seconds per row are taken from the stage's ledger, once it has some rows. Before that,
tokens are counted for a sample of prompts plus the longest possible answer, and the user gives the rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.settings import BackendSettings, InduceConfig, ModelSettings, OpenAIExpertSettings
from safer_instruct.experts.prompts import ROLES
from safer_instruct.generation.pacing import TOKENS_PER_PRICE
from safer_instruct.induction.ledger import WRITTEN_AT, Record, read_ledger, scan_records, shard_path
from safer_instruct.induction.stages import FILTER, INDUCE, RESPOND, SCORE, VARY
from safer_instruct.text.corpus import read_corpus
from safer_instruct.text.display import markdown_table
from safer_instruct.text.prompts import render_reversed

CHARACTERS_PER_TOKEN = 4.0  # typical for English with current tokenizers, used if there is no local tokenizer
SAMPLE = 512  # number of evenly spaced rows whose prompts are counted
FEWEST = 20  # rows that a ledger needs for its means to be used
PAUSE_SECONDS = 120.0  # a longer gap in a ledger means that no process was running
HEADER = ("stage", "rows", "to do", "calls", "tokens", "cost", "hours of one process")


@dataclass(frozen=True)
class Asked:
    """The model that a stage asks."""

    count_tokens: Callable[[str], float]  # prompt -> its number of tokens
    new_tokens: int  # maximum per answer
    prices: tuple[float, float] = (0.0, 0.0)  # per million prompt tokens and per million new tokens


@dataclass(frozen=True)
class Step:
    """A stage, and what is known about its work."""

    name: str  # as it is shown; its first word is its key in `rate`
    rows: int  # all rows of the stage, done or not
    prompts: Sequence[str]  # the prompts of a sample of its rows
    asked: Asked | None  # the model; None: rules, which cost nothing
    measured: Measured  # totals from its ledgers
    is_limit: bool = False  # `rows` depends on answers that do not exist yet, and is an upper bound
    calls: int = 1  # calls per row
    assumed_tokens: int = 0  # tokens of the part of a prompt that does not exist yet


@dataclass(frozen=True)
class Measured:
    """The number of finished rows in some ledgers, and totals over them."""

    rows: int = 0
    tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0  # working time, summed over all processes


def measure(paths: Sequence[Path], wanted: Callable[[str], bool] = lambda id: True) -> Measured:
    """Total up ledgers; missing ones count as empty, and rows that are not `wanted` are skipped."""
    rows, tokens, cost, seconds = set(), 0, 0.0, 0.0
    for path in paths:
        before: float | None = None
        for record, _ in scan_records(path) if path.is_file() else ():
            if wanted(record["id"]):
                rows.add(record["id"])
                tokens += record.get("tokens", 0)
                cost += record.get("cost", 0.0)
            at = record.get(WRITTEN_AT)
            if before is not None and at is not None and at - before < PAUSE_SECONDS:
                seconds += max(0.0, at - before)
            before = at
    return Measured(len(rows), tokens, cost, seconds)


def asked_model(model: ModelSettings, generation: BackendSettings) -> Asked:
    """Describe a model that a stage asks; this loads its tokenizer, unless the model is behind a server."""
    if generation.backend == "openai":
        return Asked(lambda text: len(text) / CHARACTERS_PER_TOKEN, generation.max_new_tokens)
    from safer_instruct.generation.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    return Asked(lambda text: len(tokenizer(text)["input_ids"]), generation.max_new_tokens)


def asked_expert(settings: Any) -> Asked | None:
    """Describe an expert that a stage asks; None if it is not a language model."""
    if isinstance(settings, OpenAIExpertSettings):
        prices = settings.price_prompt, settings.price_completion
        return Asked(lambda text: len(text) / CHARACTERS_PER_TOKEN, settings.max_new_tokens, prices)
    if hasattr(settings, "model") and hasattr(settings, "generation"):  # expert=local, and judges with a model
        return asked_model(settings.model, settings.generation)
    return None


def forecast_induction(config: InduceConfig, stages: Sequence[str], shard: tuple[int, int]) -> str:
    """Return the table of a shard's stages.

    Raises:
        UserError: Corpus, tokenizer or a ledger cannot be read.
    """
    index, count = shard
    examples = read_corpus(config.corpus, index=index, count=count).examples
    ledgers = Path(config.output) / "ledger"
    paths = {stage: shard_path(ledgers, stage, index, count) for stage in (INDUCE, SCORE, FILTER, RESPOND)}
    induced, verdicts = _records(paths[INDUCE]), _records(paths[FILTER])
    num_kept = sum(record["keep"] for record in verdicts.values())
    expert = asked_expert(config.expert)
    num_candidates, unwritten = config.generation.num_candidates, config.generation.max_new_tokens
    known = [one for one in examples if one.id in induced] or examples
    sample = known[:: max(1, len(known) // SAMPLE)]
    pairs = [replace(one, instruction=str(induced.get(one.id, {}).get("instruction", ""))) for one in sample]
    texts = [(pair.asked, pair.rejected or "") for pair in pairs]
    assumed = 0 if induced else unwritten

    def steps() -> Iterator[Step]:
        if INDUCE in stages:
            prompts = [render_reversed(one.rejected or "", one.history).text for one in sample]
            asked = asked_model(config.model, config.generation)
            yield Step(INDUCE, len(examples), prompts, asked, measure([paths[INDUCE]]), calls=num_candidates)
        if SCORE in stages:
            asked = replace(asked_model(config.roundtrip.model, config.generation), new_tokens=0)
            prompts = ["\n".join(both) for both in texts]
            twice = 2 * num_candidates  # with the instruction and without
            yield Step(SCORE, len(examples), prompts, asked, measure([paths[SCORE]]), False, twice, assumed)
        if FILTER in stages:
            prompts = [ROLES["screen"].render(instruction, response).text for instruction, response in texts]
            # An upper limit, because the cheap checks drop some rows before the expert sees them.
            yield Step(FILTER, len(examples), prompts, expert, measure([paths[FILTER]]), True, 1, assumed)
        if RESPOND in stages:
            prompts = [ROLES["respond"].render(instruction).text for instruction, _ in texts]
            is_known = bool(examples) and len(verdicts) == len(examples)
            rows = num_kept if is_known else len(examples)
            yield Step(RESPOND, rows, prompts, expert, measure([paths[RESPOND]]), not is_known, 1, assumed)

    where = f"{config.output}, shard {index} of {count}"
    more = "; stage=vary asks again for responses that too many rows share" if VARY in stages else ""
    return f"{where}: {len(examples)} rows in the corpus{more}\n{render_forecast(list(steps()), config.rate)}"


def _records(path: Path) -> dict[str, Record]:
    return read_ledger(path)[1] if path.is_file() else {}


def render_forecast(steps: Sequence[Step], rates: Mapping[str, float]) -> str:
    """Return the table of the steps, with notes on how to read it."""
    rows = [_row(step, rates.get(step.name.split()[0])) for step in steps]
    notes = ["no model was loaded or called; <= is an upper limit, ~ an estimate from the mean of the finished rows"]
    if any(row[-1] == "?" for row in rows):
        notes.append("hours: give a process's rows per second (rate.STAGE=...), or first run a shard for some minutes")
    return "\n".join([markdown_table(HEADER, rows, markup=range(len(HEADER))), *notes])


def _row(step: Step, rate: float | None) -> list[str]:
    done, limit = step.measured, "<= " if step.is_limit else ""
    left = max(0, step.rows - done.rows)
    shown = [step.name, f"{limit}{step.rows:,}", f"{limit}{left:,}"]
    if rate is None and done.rows >= FEWEST and done.seconds:
        rate = done.rows / done.seconds
    unknown = "?" if left else "0"
    hours = f"{limit}{left / rate / 3600:.2f}" if rate else unknown
    if step.asked is None:
        return [*shown, "0", "0", "-", hours if rate else "0"]
    calls = f"{limit}{left * step.calls:,}"
    if done.tokens and done.rows >= FEWEST:
        tokens, cost, sign = left * done.tokens / done.rows, left * done.cost / done.rows, "~ "
    else:
        counted = sum(map(step.asked.count_tokens, step.prompts)) / max(1, len(step.prompts)) + step.assumed_tokens
        per_call = counted, float(step.asked.new_tokens)
        tokens, sign = left * step.calls * sum(per_call), "<= "
        cost = left * step.calls * sum(n * price for n, price in zip(per_call, step.asked.prices, strict=True))
        cost /= TOKENS_PER_PRICE
    is_paid = any(step.asked.prices)
    return [*shown, calls, f"{sign}{tokens:,.0f}", f"{sign}{cost:,.2f}" if is_paid else "-", hours]
