"""Judges: what a language model is asked, how strictly it is read, and what two orders of a pair say together."""

import json
from dataclasses import replace

import pytest

from config.errors import UserError
from safer_instruct.evaluation.pairwise import compare_helpfulness
from safer_instruct.experts.expert import LLMExpert, RulesExpert
from safer_instruct.experts.prompts import COMPARE, JUDGE, ROLES
from safer_instruct.experts.verdicts import Judgement
from safer_instruct.generation.completions import Generation
from safer_instruct.measures.rates import JudgedOutput
from safer_instruct.text.examples import text_id
from safer_instruct.text.prompt_sets import EvaluationPrompt
from tests.evaluations import run_evaluate
from tests.loopback_server import loopback


class Scripted:
    """A generator whose answers a function decides; it remembers what it was asked."""

    name, fingerprint = "scripted", "f"

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def check(self):
        pass

    def generate(self, requests):
        for request in reversed(requests):  # any order
            self.asked.append(request.prompt.text)
            yield Generation(request.id, self.answer(request.prompt.text), prompt_tokens=5, new_tokens=2)


def judge_of(answer):
    generator = Scripted(answer)
    return LLMExpert(generator), generator


def rubric(outcome, names=False, category=""):
    return json.dumps({"outcome": outcome, "names_the_matter": names, "category": category})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (rubric("harmful", category="Theft "), Judgement("harmful", "theft", helpful=False)),
        (rubric("refusal", names=True), Judgement("refusal", "", True, helpful=False)),
        (rubric("helpful"), Judgement("safe", "", helpful=True)),
        (rubric("neither"), Judgement("safe", "", helpful=False)),
        ("```json\n" + rubric("neither") + "\n```", Judgement("safe", "", helpful=False)),
        (rubric("safe"), None),
        (rubric("harmful").replace("{", '{"outcome": "refusal", '), None),  # both
        (rubric("harmful") + " I think", None),
        ("harmful", None),
        (json.dumps({"outcome": "harmful"}), None),
        ("", None),
    ],
)
def test_the_rubric_is_read_strictly(answer, expected):
    assert JUDGE.read(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"better": "a"}', "first"),
        ('{"better": "b"}', "second"),
        ('{"better": "tie"}', "tie"),
        ('{"better": "c"}', None),
        ("a", None),
        ('{"better": "a", "why": "x"}', None),
    ],
)
def test_comparisons_are_read_strictly(answer, expected):
    assert COMPARE.read(answer) == expected


def test_the_prompts_hold_the_texts_as_they_are_and_may_cut_the_longer_answer():
    assert "{x} </answer>" in JUDGE.render("{x} </answer>", "{instruction}").text
    prompt = COMPARE.render("ask {instruction} {0}", "short", "l" * 100)
    assert "ask {instruction} {0}" in prompt.head
    assert prompt.body == "l" * 100
    assert COMPARE.render("ask", "l" * 100, "short").body == "l" * 100
    assert prompt.text.index("short") < prompt.text.index("lll")


def test_judgements_come_as_they_are_made_and_what_cannot_be_read_is_an_abstention():
    judge, _ = judge_of(lambda text: "mumble" if "second output" in text else rubric("refusal"))
    found = judge.judge([("1", "ask", "first output"), ("2", "ask", "second output")])
    assert next(found) == ("2", Judgement("abstain", tokens=7, reason="abstain_unreadable"))
    assert dict(found) == {"1": Judgement("refusal", "", False, 7, helpful=False)}


def outputs(texts, kind="benign"):
    return [
        JudgedOutput(EvaluationPrompt(str(i), f"ask {i}", "s", "s", "", kind), text, False, Judgement("safe"))
        for i, text in enumerate(texts)
    ]


def between(text, start, end):
    return text.split(start)[1].split(end)[0].strip()


def prefers(better):
    """A judge that reads the two answers and applies `better(first, second)` -> a | b | tie."""

    def answer(text):
        first, second = between(text, "<answer_a>", "</answer_a>"), between(text, "<answer_b>", "</answer_b>")
        return json.dumps({"better": better(first, second)})

    return answer


def helpfulness(better, tmp_path, **models):
    judge, generator = judge_of(prefers(better))
    found = compare_helpfulness(
        judge, {name: outputs(texts) for name, texts in models.items()}, baseline="base", kinds=["benign"],
        folder=tmp_path, progress=lambda n: None,
    )  # fmt: skip
    return found["models"], generator


def test_each_pair_is_judged_in_both_orders(tmp_path):
    def better(first, second):
        return "a" if first.startswith("good") else "b" if second.startswith("good") else "tie"

    models, generator = helpfulness(better, tmp_path, base=["x", "x", "good", "same"], dpo=["good", "bad", "y", "same"])
    dpo = models["dpo"]
    assert (dpo["wins"], dpo["ties"], dpo["losses"]) == (1, 2, 1)
    assert (dpo["identical"], dpo["inconsistent"], dpo["abstained"], dpo["n"]) == (1, 0, 0, 4)
    assert dpo["value"] == 0.5
    assert len(generator.asked) == 6  # three pairs, two orders; nobody is asked about equal answers


def test_a_judge_that_likes_the_first_answer_gives_nobody_a_win(tmp_path):
    models, _ = helpfulness(lambda first, second: "a", tmp_path, base=["p", "q"], dpo=["r", "s"])
    assert (models["dpo"]["value"], models["dpo"]["inconsistent"], models["dpo"]["ties"]) == (0.5, 2, 2)


def test_an_unreadable_comparison_takes_the_prompt_out_and_is_counted(tmp_path):
    def better(first, second):
        return "neither" if "odd" in first else "a" if first == "win" else "b"

    models, _ = helpfulness(better, tmp_path, base=["x", "odd"], dpo=["win", "y"])
    assert (models["dpo"]["n"], models["dpo"]["abstained"], models["dpo"]["value"]) == (1, 1, 1.0)


def test_comparisons_are_paid_for_once(tmp_path):
    first, generator = helpfulness(lambda a, b: "a", tmp_path, base=["p"], dpo=["r"])
    again, none_asked = helpfulness(lambda a, b: "b", tmp_path, base=["p"], dpo=["r"])
    assert (len(generator.asked), len(none_asked.asked)) == (2, 0)
    assert first == again
    ledger = next(tmp_path.glob("compare-*.jsonl")).read_text()
    assert text_id("ask 0", "p", "r") in ledger


def test_rules_cannot_compare():
    class Rules:
        name, fingerprint = "rules", "r"

    with pytest.raises(UserError, match=r"cannot compare two answers: choose a language model as judge"):
        RulesExpert(Rules()).compare([])


def test_the_judge_of_an_evaluation_sends_a_schema_and_repairs(tmp_path, tiny_model_folder, monkeypatch):
    """The server's first answer to every question is no JSON: without a repair all judgements would be abstentions."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "a", "instruction": "ask", "kind": "benign"}) + "\n")

    def answer(prompt, number):
        messages = server.requests[number][1]["messages"]
        if len(messages) == 1:
            return "Let me see ..."
        return json.dumps({"better": "a"}) if "<answer_a>" in prompt else rubric("refusal", names=True)

    models = [f"models.{name}.path={tiny_model_folder}" for name in ("base", "other")]
    with loopback(answer) as server:
        run_evaluate(
            *models, "models.other.template=plain", f"prompts.p.path={tmp_path / 'p.jsonl'}", "expert=openai",
            "expert.model=m", f"expert.base_url={server.url}", f"output={tmp_path / 'out'}", "samples_per_set=0",
            "generation.max_new_tokens=6", "helpfulness.baseline=base",
        )  # fmt: skip
    asked = [body for _, body, _ in server.requests if "single word" not in body["messages"][0]["content"]]
    assert all("response_format" in body for body in asked)
    assert {len(body["messages"]) for body in asked} == {1, 3}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [report["models"][name]["abstain_rate"]["value"] for name in ("base", "other")] == [0.0, 0.0]
    assert report["helpfulness"]["models"]["other"]["abstained"] == 0


def test_a_prompt_of_one_role_is_no_business_of_the_others(monkeypatch):
    judge, _ = judge_of(rubric)
    before = {role: judge.fingerprint(role) for role in ROLES}
    assert len(set(before.values())) == len(ROLES)
    monkeypatch.setitem(ROLES, "judge", replace(JUDGE, template=JUDGE.template + " Be strict."))
    edited, _ = judge_of(rubric)
    changed = {role for role in ROLES if edited.fingerprint(role) != before[role]}
    assert changed == {"judge"}
