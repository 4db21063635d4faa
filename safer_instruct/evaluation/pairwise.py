"""Compare the helpfulness of two models: the judge picks the better answer, and sees each pair in both orders.

A judge that prefers whatever it reads first gives each model one of the two votes, which makes a tie. An answer equal
to the baseline's is a tie without asking. Judges prefer long answers, so win rates are also given at equal length of
the answers (`statistics.win_rate`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safer_instruct.evaluation.answers import Advance, judge_pairs
from safer_instruct.experts.expert import Expert
from safer_instruct.experts.verdicts import Winner
from safer_instruct.measures.rates import JudgedOutput
from safer_instruct.measures.statistics import win_rate
from safer_instruct.text.examples import text_id

# The vote for whichever answer the judge read first: the model in the order (model, baseline), else the baseline.
VOTES: Mapping[Winner, float] = {"first": 1.0, "second": 0.0, "tie": 0.5}


def compare_helpfulness(
    judge: Expert,
    judged: Mapping[str, Sequence[JudgedOutput]],
    *,
    baseline: str,
    kinds: Sequence[str],
    folder: Path,
    progress: Advance,
) -> dict[str, Any]:
    """Count every model's wins against `baseline`, over the prompts of these kinds that both answered.

    Returns:
        `{"baseline", "kinds", "models": {NAME: {...}}}`. Each model has the fields of `WinRate` (absent if no prompt
        counted), `wins`, `losses` and `ties`. The ties include `identical` answers (not judged) and `inconsistent` ones
        (the orders disagree). `abstained` counts prompts for which the judge's reply could not be read.
    """
    models = {}
    base = {_key(row): row for row in judged[baseline] if row.prompt.kind in kinds}
    for name in (name for name in judged if name != baseline):
        rows = [(row, base[_key(row)]) for row in judged[name] if _key(row) in base]
        asked = {(row.prompt.instruction, row.text, other.text) for row, other in rows if row.text != other.text}
        orders = sorted(asked | {(instruction, other, own) for instruction, own, other in asked})
        winners = judge_pairs(judge, orders, folder=folder, progress=progress)
        models[name] = _count(rows, winners)
    return {"baseline": baseline, "kinds": list(kinds), "models": models}


def _key(row: JudgedOutput) -> tuple[str, str]:
    return row.prompt.set_name, row.prompt.id


def _count(rows: Sequence[tuple[JudgedOutput, JudgedOutput]], winners: Mapping[str, Winner]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    scores, extra = [], []
    for row, other in rows:
        if row.text == other.text:
            counts["identical"] += 1
            score = 0.5
        else:
            forward = winners[text_id(row.prompt.instruction, row.text, other.text)]
            backward = winners[text_id(row.prompt.instruction, other.text, row.text)]
            if "abstain" in (forward, backward):
                counts["abstained"] += 1
                continue
            score = (VOTES[forward] + 1 - VOTES[backward]) / 2
            counts["inconsistent"] += forward == backward != "tie"
        won = "wins" if score > 0.5 else "losses"
        counts["ties" if score == 0.5 else won] += 1
        scores.append(score)
        extra.append(len(row.text) - len(other.text))
    names = ("wins", "losses", "ties", "identical", "inconsistent", "abstained")
    rate = asdict(win_rate(scores, extra)) if scores else {"n": 0}
    return {**rate, **{name: counts[name] for name in names}}
