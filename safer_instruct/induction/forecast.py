"""`dry_run` of an induction or an evaluation: what is left to do, and what it takes; no model is loaded or asked.

Rows are counted. Tokens and seconds of a row are those that the stage's ledger tells, where it has some rows; else the
prompts of some rows are counted, an answer is taken to be as long as it may be, and the rate is the user's.
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

CHARACTERS_PER_TOKEN = 4.0  # of English in the vocabularies of today's models, where no tokenizer is at hand
SAMPLE = 512  # rows whose prompts are counted, evenly spaced
FEWEST = 20  # rows of a ledger that tell a mean
PAUSE_SECONDS = 120.0  # nothing was being written where a ledger has a longer gap
HEADER = ("stage", "rows", "to do", "calls", "tokens", "cost", "hours of one process")


@dataclass(frozen=True)
class Asked:
    """Who is asked in a stage."""

    count_tokens: Callable[[str], float]  # of a prompt
    new_tokens: int  # of an answer, at most
    prices: tuple[float, float] = (0.0, 0.0)  # of a million prompt tokens and a million new ones


@dataclass(frozen=True)
class Step:
    """A stage, and what is known of it."""

    name: str  # as it is shown; its first word is its key in `rate`
    rows: int  # of the stage, done or not
    prompts: Sequence[str]  # of some of its rows
    asked: Asked | None  # who answers; None: rules, which take nothing
    measured: Measured  # what its ledgers tell
    is_limit: bool = False  # `rows` depends on answers that do not exist yet, and is an upper bound
    calls: int = 1  # of each row
    assumed_tokens: int = 0  # of the part of a prompt that is not written yet


@dataclass(frozen=True)
class Measured:
    """What ledgers tell of the rows that are done: their number, and sums over them."""

    rows: int = 0
    tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0  # of writing, of all processes


def measure(paths: Sequence[Path], wanted: Callable[[str], bool] = lambda id: True) -> Measured:
    """Read ledgers; those that are not there have no rows, and rows that are not `wanted` do not count."""
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
    """Return what asking a model takes; its tokenizer is loaded, unless the model is behind a server."""
    if generation.backend == "openai":
        return Asked(lambda text: len(text) / CHARACTERS_PER_TOKEN, generation.max_new_tokens)
    from safer_instruct.generation.models import load_tokenizer

    tokenizer = load_tokenizer(model)
    return Asked(lambda text: len(tokenizer(text)["input_ids"]), generation.max_new_tokens)


def asked_expert(settings: Any) -> Asked | None:
    """Return what asking an expert takes; None for one that is no language model."""
    if isinstance(settings, OpenAIExpertSettings):
        prices = settings.price_prompt, settings.price_completion
        return Asked(lambda text: len(text) / CHARACTERS_PER_TOKEN, settings.max_new_tokens, prices)
    if hasattr(settings, "model") and hasattr(settings, "generation"):  # local, and judges that are models
        return asked_model(settings.model, settings.generation)
    return None


def forecast_induction(config: InduceConfig, stages: Sequence[str], shard: tuple[int, int]) -> str:
    """Return the table of the stages of a shard.

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
            # A limit, because cheap checks drop some rows that nobody is asked about.
            yield Step(FILTER, len(examples), prompts, expert, measure([paths[FILTER]]), True, 1, assumed)
        if RESPOND in stages:
            prompts = [ROLES["respond"].render(instruction).text for instruction, _ in texts]
            is_known = bool(examples) and len(verdicts) == len(examples)
            rows = num_kept if is_known else len(examples)
            yield Step(RESPOND, rows, prompts, expert, measure([paths[RESPOND]]), not is_known, 1, assumed)

    where = f"{config.output}, shard {index} of {count}"
    more = "; stage=vary asks again what many rows got alike" if VARY in stages else ""
    return f"{where}: {len(examples)} rows in the corpus{more}\n{render_forecast(list(steps()), config.rate)}"


def _records(path: Path) -> dict[str, Record]:
    return read_ledger(path)[1] if path.is_file() else {}


def render_forecast(steps: Sequence[Step], rates: Mapping[str, float]) -> str:
    """Return the table of the steps, and how to read it."""
    rows = [_row(step, rates.get(step.name.split()[0])) for step in steps]
    notes = ["nothing was loaded or asked; <= is a limit, ~ the mean of the rows that are done"]
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
