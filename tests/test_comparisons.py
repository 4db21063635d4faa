"""Paired comparisons and the agreement of judges against tables counted by hand."""

import pytest

from safer_instruct.experts.verdicts import Judgement
from safer_instruct.measures.comparisons import TESTED, compare_models, judge_agreement
from safer_instruct.measures.rates import JudgedOutput, summarize
from safer_instruct.report.tables import extra_tables
from safer_instruct.text.prompt_sets import EvaluationPrompt


def rows(outcomes, *, source="si", kind="unsafe", set_name="s"):
    return [
        JudgedOutput(
            EvaluationPrompt(f"{source}{i}", f"ask {i}", set_name, source, "", kind), f"text {i}", False, Judgement(one)
        )
        for i, one in enumerate(outcomes)
    ]


H, R, S, A = "harmful", "refusal", "safe", "abstain"
# prompts of si: both harmful 2, only base 5, only dpo 1, neither 1, and one on which the judge of dpo abstained
BASE = rows([H, H, H, H, H, H, H, R, S, H]) + rows([H, H], source="hh")
DPO = rows([H, H, R, R, R, S, R, H, R, A]) + rows([R, H], source="hh")


def compared(**models):
    return compare_models(models, {name: summarize(outputs) for name, outputs in models.items()})


def test_two_models_on_the_same_prompts():
    entries = {(one["metric"], one["source"]): one for one in compared(base=BASE, dpo=DPO)}
    si, everything = entries["harmful_rate", "si"], entries["harmful_rate", "all"]
    assert (si["n"], si["only_first"], si["only_second"]) == (9, 5, 1)  # the abstention counts for neither
    assert si["difference"] == pytest.approx(-4 / 9)
    assert si["p"] == pytest.approx(2 * (1 + 6) / 2**6)  # two-sided sign test of 1 in 6
    assert (everything["n"], everything["only_first"], everything["only_second"]) == (11, 6, 1)
    assert ("refusal_rate", "si") not in entries  # by source: harm alone
    assert entries["refusal_rate", "all"]["only_second"] == 6
    assert "over_refusal_rate" not in {metric for metric, _ in entries}  # no benign prompt


def test_p_values_are_corrected_over_the_whole_table():
    entries = compared(base=BASE, dpo=DPO, sft=BASE)
    assert len(entries) == 3 * (3 + 1)  # three pairs of models: harm over all and by source, refusals over all
    smallest = min(entries, key=lambda one: one["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, len(entries) * smallest["p"]))
    assert all(one["p_holm"] >= one["p"] for one in entries)


def test_prompts_are_matched_by_set_and_id_whatever_their_order():
    assert compared(a=BASE, b=DPO) == compared(a=BASE[::-1], b=DPO)
    other_set = rows([H] * 4, set_name="t")
    assert compared(a=BASE, b=other_set) == []


def test_an_undefined_rate_is_not_compared():
    assert "safe_helpful_rate" in TESTED
    assert "safe_helpful_rate" not in {one["metric"] for one in compared(base=BASE, dpo=DPO)}


def test_agreement_of_two_judges():
    second = [Judgement(one) for one in [H, H, H, H, R, S, H, R, S, A, H, H]]
    found = judge_agreement(("x", "y"), {"base": BASE}, {"base": second})
    assert (found["n"], found["agreed"]) == (12, 9)
    assert found["table"][H] == {H: 7, R: 1, S: 1, A: 1}
    assert found["disagreements"][0] == {"model": "base", "set": "s", "id": "si4", "first": H, "second": R}
    assert [one["id"] for one in found["disagreements"]] == ["si4", "si5", "si9"]
    # without the abstention: 9 of 11 agree; by chance (9*7 + 1*2 + 1*2) / 11^2
    chance = (9 * 7 + 1 * 2 + 1 * 2) / 11**2
    assert found["kappa"]["value"] == pytest.approx((9 / 11 - chance) / (1 - chance))
    assert judge_agreement(("x", "y"), {"base": []}, {"base": []}) is None


def test_the_tables_say_what_the_numbers_are():
    report = {"comparisons": compared(base=BASE, dpo=DPO)}
    second = [Judgement(one.judgement.outcome) for one in BASE]
    report["agreement"] = judge_agreement(("x", "y"), {"base": BASE}, {"base": second})
    tables = extra_tables(report)
    titles = ["Models compared on the same prompts", "Agreement of the judges"]
    assert [table.title for table in tables] == titles  # nothing to list: they agree
    by_source = next(row for row in tables[0].rows if row[0] == "harmful answers, si")
    # p values 1/8, 1/8, 7/32, 1: Holm makes them 4/8, 4/8, at least its predecessor's 4/8 (7/16 is less), 1
    assert by_source[1:] == ["base -> dpo", by_source[2], "5 / 1", "9", "0.219", "0.500"]
    assert by_source[2].startswith("-44.4 [")
    assert "12 of 12 answers (100.0%)" in tables[1].caption


def test_a_source_named_all_is_not_taken_for_all_of_them():
    models = {name: rows([H, H, R], source="all") + rows([H, R], source="x") for name in ("base", "dpo")}
    entries = compared(**models)
    assert [(one["source"], one["n"]) for one in entries if one["metric"] == "harmful_rate"] == [("all", 5), ("x", 2)]
