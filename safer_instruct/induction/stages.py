"""Induce, score, filter, respond: each a function from Examples to ledger records, with cheap checks before paid ones.

Records hold an `id` and the results of the stage; corpus texts are not copied into them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from config.errors import UserError
from config.names import STAGES
from config.settings import InductionSettings
from safer_instruct.experts.expert import Expert
from safer_instruct.generation.completions import Generation, Request, TextGenerator
from safer_instruct.induction.checks import CHECKS_VERSION, cheap_check, low_score
from safer_instruct.induction.ledger import Record, is_final
from safer_instruct.text.examples import Example, short_hash, text_id
from safer_instruct.text.prompts import render_reversed

INDUCE, SCORE, FILTER, RESPOND, VARY = STAGES  # score needs a forward model, vary needs respond.max_same
OPTIONAL_STAGES = (SCORE, VARY)
ROWS_AT_A_TIME = 4096  # rows that are sorted by length together

Stage = Callable[[Sequence[Example]], Iterator[Record]]  # yields one record (with the example's `id`) per example
Item = tuple[tuple[str, int], Example]  # ((row id, candidate number), the pair with that candidate)


@dataclass(frozen=True, slots=True)
class Score:
    """How well an instruction explains a response: (log P(response | instruction) - log P(response)) per token."""

    nats_per_token: float  # the score
    tokens: int  # tokens of the scored row, prompt and response


class Scorer(Protocol):
    """A forward model, such as `round_trip.RoundTrip`."""

    name: str
    fingerprint: str

    def score(self, items: Sequence[Item]) -> Iterable[tuple[tuple[str, int], Score | None]]:
        """Yield (key, score) for each item, in any order; the score is None if the item does not fit the model."""


def stage_induce(generator: TextGenerator, num_candidates: int = 1) -> Stage:
    """Build the stage in which the reversed model writes `num_candidates` instructions for each response.

    A record's `instruction` is the first candidate that came; all of several, each with a seed of its own, are in
    `candidates`.
    """

    def run(examples: Sequence[Example]) -> Iterator[Record]:
        by_id = {example.id: example for example in examples}
        waiting: dict[str, dict[int, Generation]] = {id: {} for id in by_id}
        requests = [
            Request(candidate_id(id, number), render_reversed(example.rejected or "", example.history))
            for id, example in by_id.items()
            for number in range(num_candidates)
        ]
        rows = {request.id: divmod(i, num_candidates) for i, request in enumerate(requests)}
        ids = list(by_id)
        for generation in generator.generate(requests):
            row, number = rows[generation.id]
            found = waiting[ids[row]]
            found[number] = generation
            if len(found) == num_candidates:
                yield _induced(by_id[ids[row]], [found[i] for i in range(num_candidates)])
                del waiting[ids[row]]

    return run


def candidate_id(id: str, number: int) -> str:
    """Return the id of a candidate's request, which seeds its sampling; the first candidate has the row's own id."""
    return f"{id}/{number}" if number else id


def _induced(example: Example, generations: Sequence[Generation]) -> Record:
    first = next((one for one in generations if not one.error), generations[0])
    record = {
        "id": example.id,
        "response": example.response_id,  # to notice a corpus whose responses have changed under the same ids
        "instruction": first.text.strip(),
        "truncated": first.truncated,
        "prompt_cut": first.prompt_cut,
        "tokens": sum(one.tokens for one in generations),
        **({"error": first.error} if first.error else {}),
    }
    if len(generations) > 1:
        record["candidates"] = [
            {"instruction": one.text.strip(), "truncated": one.truncated, **({"error": one.error} if one.error else {})}
            for one in generations
        ]
    return record


def stage_score(scorer: Scorer) -> Stage:
    """Build the stage that scores every candidate that passes the cheap checks, and picks the best.

    `scores` holds each candidate's score in nats per token of the response, or null if it has none.
    """

    def run(examples: Sequence[Example]) -> Iterator[Record]:
        items = []
        scores: dict[str, list[float | None]] = {}
        tokens: Counter[str] = Counter()
        failed = {example.id: _failure(example) for example in examples}
        for example in examples:
            found = candidates(example)
            scores[example.id] = [None] * len(found)
            for number, candidate in enumerate(found):
                if not cheap_check(candidate):
                    items.append(((example.id, number), candidate))
        for (id, number), score in scorer.score(items):
            scores[id][number] = None if score is None else round(score.nats_per_token, 4)
            tokens[id] += 0 if score is None else score.tokens
        for id, of_row in scores.items():
            known = [number for number, score in enumerate(of_row) if score is not None]
            best = max(known, key=lambda number: (of_row[number], -number)) if known else 0
            yield {"id": id, "best": best, "scores": of_row, "tokens": tokens[id], **failed[id]}

    return run


def candidates(pair: Example) -> list[Example]:
    """Return one pair per candidate, with the candidate as its instruction; only the pair itself if none are listed."""
    listed = pair.provenance.get("candidates")
    if not listed:
        return [pair]
    return [
        replace(
            pair,
            instruction=one["instruction"],
            provenance={**pair.provenance, "truncated": one["truncated"], "error": one.get("error", "")},
        )
        for one in listed
    ]


def stage_filter(expert: Expert, *, min_score: float | None = None) -> Stage:
    """Build the stage that decides which pairs to keep: cheap checks, then the round-trip score, then the expert.

    `min_score` is the minimum round-trip score for keeping a pair; None skips this check.
    """

    def run(examples: Sequence[Example]) -> Iterator[Record]:
        passed = []
        for example in examples:
            if reason := cheap_check(example) or low_score(example, min_score):
                record = {"id": example.id, "keep": False, "reason": reason, "label": "", "tokens": 0}
                yield {**record, **_failure(example), **_about(example)}
            else:
                passed.append(example)
        by_id = {example.id: example for example in passed}
        for id, verdict in expert.screen(passed):
            record = {"id": id, "keep": verdict.keep, "reason": verdict.reason, "label": verdict.label}
            yield {**record, "tokens": verdict.tokens, **paid(verdict.cost), **_about(by_id[id])}

    return run


def least_score(scores: Iterable[float], fraction: float) -> float:
    """Return the minimum score of the best `fraction` of pairs; infinite if that is no pair at all."""
    ranked = sorted(scores, reverse=True)
    keep = round(fraction * len(ranked))
    return ranked[keep - 1] if keep else float("inf")


def paid(cost: float) -> Record:
    """Return the `cost` field of a record; nothing if the answer had no cost."""
    return {"cost": round(cost, 9)} if cost else {}


def _about(pair: Example) -> Record:
    return {"instruction_id": text_id(pair.instruction or "")}


def _failure(pair: Example) -> Record:
    """Return why there is no instruction, if there is none: what is said of such a row is final if that is."""
    return {"error": pair.provenance["error"]} if pair.provenance.get("error") else {}


def require_same_instruction(pair: Example, record: Record, stage: str) -> None:
    """Raise a UserError if a record of filter or respond belongs to a different instruction from the pair's.

    A record without `instruction_id` was written by an earlier version and is accepted.
    """
    if record.get("instruction_id") not in (None, text_id(pair.instruction or "")):
        if not is_final(record):
            raise unfinished("some", stage)
        raise UserError(
            f"row {pair.id} ({pair.provenance['source']}): its record of stage={stage} is about another instruction "
            "than the ledger of stage=induce has now; restore the old ledger, or delete those of the later stages and "
            "rerun them"
        )


def stage_respond(expert: Expert, role: str = RESPOND) -> Stage:
    """Build the stage in which the expert answers each kept instruction safely; role=vary asks for another wording."""

    def run(examples: Sequence[Example]) -> Iterator[Record]:
        by_id = {example.id: example for example in examples}
        for id, response in expert.write(role, examples):
            record = {"id": id, "chosen": response.text, "reason": response.reason, "tokens": response.tokens}
            yield {**record, **paid(response.cost), **_about(by_id[id])}

    return run


def with_instructions(
    examples: Sequence[Example], records: Mapping[str, Record], scores: Mapping[str, Record] | None = None
) -> list[Example]:
    """Join the corpus with the records of the induce stage, and of the score stage if given.

    Raises:
        UserError: A row has no record, or its response has changed since.
    """
    require_records(examples, records, INDUCE)
    pairs = [with_instruction(example, records[example.id]) for example in examples]
    if scores is None:
        return pairs
    require_records(examples, scores, SCORE)
    return [with_score(pair, scores[pair.id]) for pair in pairs]


def with_instruction(example: Example, record: Record) -> Example:
    """Join one row with its record of the induce stage; see with_instructions."""
    if record["response"] != example.response_id:
        raise UserError(
            f"row {example.id} ({example.provenance['source']}): the corpus has changed since its instruction was "
            "induced; give the old corpus.path, or another output=FOLDER"
        )
    found = {"truncated": record["truncated"], "error": record.get("error", "")}
    if "candidates" in record:
        found["candidates"] = record["candidates"]
    return replace(example, instruction=record["instruction"], provenance={**example.provenance, **found})


def with_score(pair: Example, record: Record) -> Example:
    """Make the best candidate the pair's instruction, and add its score to the provenance."""
    chosen = candidates(pair)[record["best"]]
    found = {"round_trip": record["scores"][record["best"]], "candidate_scores": record["scores"]}
    return replace(chosen, provenance={**chosen.provenance, **found})


def kept(examples: Sequence[Example], records: Mapping[str, Record]) -> list[Example]:
    """Return the examples that the filter stage kept.

    Raises:
        UserError: A row has no record, or one for another instruction.
    """
    require_records(examples, records, FILTER)
    for example in examples:
        require_same_instruction(example, records[example.id], FILTER)
    return [example for example in examples if records[example.id]["keep"]]


def require_records(examples: Sequence[Example], records: Mapping[str, Record], stage: str) -> None:
    """Raise a UserError with the number of rows that a stage has not finished, if there are any."""
    num_missing = sum(example.id not in records for example in examples)
    if num_missing:
        raise unfinished(f"{num_missing} of {len(examples)}", stage)


def unfinished(rows: object, stage: str) -> UserError:
    """Return the error for `rows` rows that have no record of a stage yet."""
    return UserError(
        f"{rows} rows have no result of stage={stage} yet; finish that stage first: the same command with "
        f"stage={stage} resumes it"
    )


def induce_configuration(name: str, fingerprint: str, generation: InductionSettings) -> dict[str, Any]:
    """Return everything that the induce stage's records depend on, for the header of its ledger."""
    names = ("max_new_tokens", "temperature", "top_p", "seed", "num_candidates", "backend")
    return {
        "model": name,
        "model_fingerprint": fingerprint,
        "prompt": short_hash(render_reversed("").text),
        **{f"generation.{name}": vars(generation)[name] for name in names},
    }


def score_configuration(scorer: Scorer, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that the score stage's records depend on, including the stage before."""
    scored_by = {"forward_model": scorer.name, "forward_fingerprint": scorer.fingerprint}
    return {**scored_by, "stage_before": stage_digest(before)}


def expert_configuration(expert: Expert, before: Mapping[str, Any], role: str, **more: Any) -> dict[str, Any]:
    """Return everything that the records of an expert's stage depend on, including the stage before."""
    return {
        "expert": expert.name,
        "expert_fingerprint": expert.fingerprint(role),
        "expert_prompt": expert.prompt_hashes.get(role),
        "checks": CHECKS_VERSION,
        "stage_before": stage_digest(before),
        **more,
    }


def stage_digest(configuration: Mapping[str, Any]) -> str:
    """Return the hash that identifies this configuration in the ledger header of the next stage."""
    return short_hash(repr(sorted(configuration.items())))
