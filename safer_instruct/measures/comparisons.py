"""Compare every two models on the same prompts, with significance tests, and measure the agreement of two judges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, get_args

from safer_instruct.experts.verdicts import Judgement, Outcome
from safer_instruct.measures.rates import METRICS, JudgedOutput
from safer_instruct.measures.statistics import cohens_kappa, compare_paired, holm

# The metrics to compare models by; the first one is also compared within each source.
TESTED = ("harmful_rate", "refusal_rate", "safe_helpful_rate", "over_refusal_rate", "benign_accuracy", "near_accuracy")
ALL_SOURCES = "all"

Judged = Mapping[str, Sequence[JudgedOutput]]
Key = tuple[str, str]  # set, id


def compare_models(judged: Judged, reported: Mapping[str, Mapping[str, Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Compare every two models in pairs, with p values corrected over the whole table (Holm).

    A metric that is undefined in a model's `reported` rates (`rates.summarize`) is not compared.

    Returns:
        One entry `{metric, source, first, second, n, only_first, only_second, difference, low, high, p, p_holm}` for
        each metric and two models with common prompts; `difference` is the second model's share minus the first's.
    """
    entries = []
    for metric in TESTED:
        counted = {
            name: dict(_flags(metric, rows)) if reported[name][metric]["n"] else {} for name, rows in judged.items()
        }
        sources = sorted({source for flags in counted.values() for source, _ in flags.values()})
        groups = [ALL_SOURCES, *(sources if metric == TESTED[0] and len(sources) > 1 else [])]
        for source in dict.fromkeys(groups):
            for first, second in combinations(judged, 2):
                found = compare_paired(list(_common(counted[first], counted[second], source)), seed=seed)
                if found is not None:
                    head = {"metric": metric, "source": source, "first": first, "second": second}
                    entries.append({**head, **asdict(found)})
    corrected = holm([entry["p"] for entry in entries])
    return [{**entry, "p_holm": p} for entry, p in zip(entries, corrected, strict=True)]


def _flags(metric: str, rows: Sequence[JudgedOutput]) -> Iterator[tuple[Key, tuple[str, bool]]]:
    for row in rows:
        flag = METRICS[metric](row)
        if flag is not None:
            yield (row.prompt.set_name, row.prompt.id), (row.prompt.source, flag)


def _common(
    first: Mapping[Key, tuple[str, bool]], second: Mapping[Key, tuple[str, bool]], source: str
) -> Iterator[tuple[bool, bool]]:
    for key, (its_source, flag) in first.items():
        if key in second and source in (ALL_SOURCES, its_source):
            yield flag, second[key][1]


def judge_agreement(
    names: tuple[str, str], judged: Judged, second: Mapping[str, Sequence[Judgement]]
) -> dict[str, Any] | None:
    """Measure how well two judges agree on the same answers; None without an answer.

    Kappa covers the answers on which neither judge abstained; the table of outcomes also counts abstentions. Answers
    are identified by model, set and id, never by their text.

    `second` holds the judgements of the other judge, in the order of `judged`.
    """
    outcomes = get_args(Outcome)
    table = {mine: dict.fromkeys(outcomes, 0) for mine in outcomes}
    disagreements = []
    for model, rows in judged.items():
        for row, other in zip(rows, second[model], strict=True):
            mine = row.judgement.outcome
            table[mine][other.outcome] += 1
            if mine != other.outcome:
                where = {"model": model, "set": row.prompt.set_name, "id": row.prompt.id}
                disagreements.append({**where, "first": mine, "second": other.outcome})
    n = sum(map(sum, (row.values() for row in table.values())))
    if not n:
        return None
    both = [outcome for outcome in outcomes if outcome != "abstain"]
    kappa = cohens_kappa([[table[mine][other] for other in both] for mine in both])
    return {
        "judges": list(names),
        "n": n,
        "agreed": n - len(disagreements),
        "kappa": None if kappa is None else dict(zip(("value", "low", "high"), kappa, strict=True)),
        "table": table,
        "disagreements": disagreements,
    }
