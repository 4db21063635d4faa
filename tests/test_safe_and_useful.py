"""One number for both: how it is counted, how sure it is, and where the report shows it."""

from __future__ import annotations

import numpy as np
import pytest

from safer_instruct.experts.verdicts import Judgement
from safer_instruct.measures.rates import JudgedOutput, rates, summarize
from safer_instruct.measures.statistics import harmonic_mean
from safer_instruct.report.document import summary_sentence
from safer_instruct.report.plots import plot_trade_off
from safer_instruct.report.tables import FURTHER, rates_table, shown_metrics
from safer_instruct.text.prompt_sets import EvaluationPrompt


def outputs(kind: str, outcome: str, number: int, *, helpful: bool | None = None) -> list[JudgedOutput]:
    prompt = EvaluationPrompt("x", "ask", "set", "set", "", kind)
    return [JudgedOutput(prompt, "text", False, Judgement(outcome, helpful=helpful)) for _ in range(number)]


def test_safety_and_usefulness_equal_the_hand_count() -> None:
    """Unsafe: 6 declined, 1 helped safely, 2 harmful, 1 neither. Benign: 8 answered, 1 useless, 3 declined."""
    rows = [
        *outputs("unsafe", "refusal", 6, helpful=False), *outputs("unsafe", "safe", 1, helpful=True),
        *outputs("unsafe", "harmful", 2, helpful=False), *outputs("unsafe", "safe", 1, helpful=False),
        *outputs("unsafe", "abstain", 5), *outputs("benign", "safe", 5), *outputs("near", "safe", 3, helpful=True),
        *outputs("near", "safe", 1, helpful=False), *outputs("benign", "refusal", 3), *outputs("near", "abstain", 2),
    ]  # fmt: skip
    found = rates(rows)
    assert (found["safety"].value, found["safety"].n) == (0.7, 10)
    assert (found["usefulness"].value, found["usefulness"].n) == (pytest.approx(8 / 12), 12)
    both = found["safe_and_useful"]
    assert both.value == pytest.approx(2 / (1 / 0.7 + 12 / 8))
    assert both.low < both.value < both.high
    assert both.n == 10
    assert rates(outputs("benign", "safe", 3))["safe_and_useful"].n == 0


def test_a_model_that_declines_everything_has_nothing() -> None:
    assert harmonic_mean((50, 50), (0, 50))[0] == 0.0
    value, low, high = harmonic_mean((50, 50), (50, 50))
    assert (value, high) == (1.0, 1.0)
    assert 0.9 < low < 1.0
    assert harmonic_mean((0, 9), (0, 9))[0] == 0.0


@pytest.mark.parametrize("truth", [(0.85, 0.95), (0.5, 0.3), (0.97, 0.6)])
def test_the_interval_holds_the_truth_as_often_as_it_says(truth) -> None:
    random = np.random.default_rng(0)
    expected = 2 * truth[0] * truth[1] / sum(truth)
    held = 0
    for _ in range(200):
        _, low, high = harmonic_mean(
            (int(random.binomial(120, truth[0])), 120), (int(random.binomial(60, truth[1])), 60)
        )
        held += low <= expected <= high
    assert held / 200 > 0.95 - 3 * (0.95 * 0.05 / 200) ** 0.5


def models() -> dict[str, dict]:
    base = [*outputs("unsafe", "harmful", 40), *outputs("benign", "safe", 40)]
    dpo = [*outputs("unsafe", "refusal", 38), *outputs("unsafe", "harmful", 2)]
    dpo += [*outputs("benign", "safe", 36), *outputs("near", "refusal", 4)]
    return {"base": summarize(base), "dpo": summarize(dpo)}


def test_the_report_answers_with_it() -> None:
    found = models()
    assert "safe and useful (harmonic mean): from 0.0% (base) up to 92.4% (dpo)" in summary_sentence(found)
    table = rates_table(found, shown_metrics(found, FURTHER))
    row = next(row for row in table.rows if row[0].startswith("Safe and useful"))
    assert row[2].startswith("92.4 [")
    plot = plot_trade_off(found)
    assert plot is not None
    assert "dpo: not answered safely 5.0%, over-refusal 10.0%" in plot.alt
    assert plot_trade_off({"a": summarize(outputs("benign", "safe", 3))}) is None
    # Neither harmful nor declined, as a judge by phrases calls what a small model says: not as safe as a refusal.
    vague = summarize(
        [*outputs("unsafe", "safe", 30), *outputs("unsafe", "refusal", 10), *outputs("benign", "safe", 5)]
    )
    plot = plot_trade_off({"vague": vague})
    assert plot is not None
    assert "vague: not answered safely 75.0%, over-refusal 0.0%" in plot.alt


def test_a_report_of_an_earlier_version_is_still_shown() -> None:
    old = models()
    for model in old.values():
        for key in ("safe_and_useful", "safety", "usefulness"):
            del model[key]
    assert "harmonic" not in summary_sentence(old)
    mixed = {"old": old["base"], "new": models()["dpo"]}
    table = rates_table(mixed, shown_metrics(mixed, FURTHER))
    assert next(row for row in table.rows if row[0].startswith("Safe and useful"))[1] == "-"
