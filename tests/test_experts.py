"""Experts: strict readers, a server of our own in front of the real client, a local model, rules."""

from __future__ import annotations

import json
import socket
import threading

import pytest
import torch
from conftest import tiny_llama

from config.errors import UserError
from config.settings import (
    BackendSettings,
    LocalExpertSettings,
    ModelSettings,
    OpenAIExpertSettings,
    RulesExpertSettings,
)
from safer_instruct.experts.expert import build_expert
from safer_instruct.experts.prompts import JUDGE, RESPOND, SCREEN
from safer_instruct.experts.verdicts import Judgement, Verdict
from safer_instruct.generation.backends import in_template
from safer_instruct.text.examples import Example
from safer_instruct.text.prompts import Prompt
from tests.loopback_server import completion, loopback

CPU = torch.device("cpu")
KEEP = {"well_formed": True, "unsafe": True, "response_fits": True, "category": "Theft "}
SECRET = "zebra-secret"


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-nothing")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def openai_expert(url: str, **options):
    settings = {"model": "m", "base_url": url, "api_key_env": "TEST_KEY", "max_retries": 3, "timeout_seconds": 5.0}
    return build_expert(OpenAIExpertSettings(**{**settings, **options}), CPU)


def pairs(count: int) -> list[Example]:
    return [Example(f"r{i}", instruction=f"Take item {i} {{body}}", rejected=f"{SECRET} {i}") for i in range(count)]


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, Verdict(True, "keep", "theft")),
        ({"well_formed": False, "unsafe": False}, Verdict(False, "ill_formed_instruction", "theft")),
        ({"unsafe": False}, Verdict(False, "instruction_not_unsafe", "theft")),
        ({"response_fits": False, "category": ""}, Verdict(False, "response_does_not_fit", "")),
    ],
)
def test_filter_answers(change, verdict) -> None:
    answer = json.dumps({**KEEP, **change})
    assert SCREEN.read(answer) == verdict
    assert SCREEN.read(f"\n```json\n{answer}\n```\n") == verdict


@pytest.mark.parametrize(
    "answer",
    [
        "", "yes", "true", "null", "[]", json.dumps([KEEP]), json.dumps(KEEP) + " I hope this helps",
        "Sure: " + json.dumps(KEEP), json.dumps(KEEP)[:-1], json.dumps({**KEEP, "unsafe": "true"}),
        json.dumps({**KEEP, "unsafe": 1}), json.dumps({**KEEP, "more": 1}), json.dumps({**KEEP, "category": None}),
        json.dumps({"well_formed": True}), "[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_not_exactly_an_answer_is_none(answer) -> None:
    assert SCREEN.read(answer) is None
    assert JUDGE.read(answer) is None


def test_judge_answers() -> None:
    def judge(outcome, names) -> Judgement | None:
        return JUDGE.read(json.dumps({"outcome": outcome, "names_the_matter": names, "category": "dare"}))

    assert judge("harmful", True) == Judgement("harmful", "dare", None, helpful=False)
    assert judge("refusal", True) == Judgement("refusal", "dare", True, helpful=False)
    assert judge("refusal", False) == Judgement("refusal", "dare", False, helpful=False)
    assert judge("neither", False) == Judgement("safe", "dare", None, helpful=False)
    assert judge("abstain", False) is None
    assert judge("Harmful", False) is None


def test_prompts_hold_the_material_once_and_as_it_is() -> None:
    instruction, text = "do {this} {body} {{x}}", "then {instruction} %s"
    for prompt in (SCREEN.render(instruction, text), JUDGE.render(instruction, text)):
        assert prompt.body == text
        assert prompt.head.count(instruction) == 1
        assert "{body}" not in prompt.tail
        assert '{"' in prompt.tail
    assert RESPOND.render(instruction).body == instruction


def test_a_server_is_asked_and_read() -> None:
    def answer(prompt: str, number: int):
        item = prompt.split("Take item ")[1].split()[0]
        if "The reply:" in prompt:
            return f"  I will not take item {item}. "
        return json.dumps({**KEEP, "response_fits": int(item) % 2 == 0})

    with loopback(answer) as server:
        expert = openai_expert(server.url)
        verdicts = dict(expert.screen(pairs(6)))
        responses = dict(expert.write("respond", pairs(3)))
        judgements = list(openai_expert(server.url).judge([]))
    assert {id: verdict.keep for id, verdict in verdicts.items()} == {f"r{i}": i % 2 == 0 for i in range(6)}
    assert all(verdict.tokens == 15 and verdict.label == "theft" for verdict in verdicts.values())
    assert {id: r.text for id, r in responses.items()} == {f"r{i}": f"I will not take item {i}." for i in range(3)}
    assert judgements == []
    path, body, headers = server.requests[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 512)
    assert headers["authorization"] == "Bearer sk-nothing"


def test_unreadable_answers_are_recorded_abstentions() -> None:
    odd = {
        0: "I'd say keep it",
        1: (200, completion(None)),
        2: (200, completion(json.dumps(KEEP)[:20], "length")),
        3: (200, completion("", "content_filter")),
        4: (400, {"error": {"message": f"bad {SECRET}"}}),
        5: (200, b'{"broken'),
        6: (200, {"object": "chat.completion", "choices": []}),
        7: (200, b'"text"'),
    }

    def answer(prompt: str, _: int):
        return odd[int(prompt.split("Take item ")[1].split()[0])] if "Take item" in prompt else "ready"

    with loopback(answer) as server:
        expert = openai_expert(server.url)
        verdicts = dict(expert.screen(pairs(8)))
        responses = dict(expert.write("respond", pairs(8)))
        judgements = dict(expert.judge([(f"r{i}", f"Take item {i}", "x") for i in range(8)]))
    reasons = {id: verdict.reason for id, verdict in verdicts.items()}
    assert not any(verdict.keep for verdict in verdicts.values())
    assert reasons == {
        "r0": "abstain_unreadable", "r1": "abstain_empty", "r2": "abstain_truncated", "r3": "abstain_content_filter",
        "r4": "abstain_http_400", "r5": "abstain_malformed_reply", "r6": "abstain_malformed_reply",
        "r7": "abstain_malformed_reply",
    }  # fmt: skip
    assert {id: response.reason for id, response in responses.items() if response.text is None} == {
        id: reason for id, reason in reasons.items() if id != "r0"
    }
    assert responses["r0"].text == "I'd say keep it"
    assert [judgement.outcome for judgement in judgements.values()] == ["abstain"] * 8


def test_judgements_are_those_of_their_items() -> None:
    def answer(prompt: str, _: int) -> str:
        outcome = prompt.split("outcome-")[1].split()[0]
        return json.dumps({"outcome": outcome, "names_the_matter": True, "category": ""})

    items = [(str(i), "x", f"outcome-{('harmful', 'refusal', 'neither')[i % 3]} .") for i in range(9)]
    with loopback(answer) as server:
        found = dict(openai_expert(server.url).judge(items))
    judgements = [found[id] for id, _, _ in items]
    assert [j.outcome for j in judgements] == ["harmful", "refusal", "safe"] * 3
    assert [j.specific for j in judgements] == [None, True, None] * 3
    with pytest.raises(ValueError, match="unique"):
        openai_expert("http://127.0.0.1:1/v1").judge([("a", "", ""), ("a", "", "")])


def test_a_failing_server_is_asked_again() -> None:
    failures = [(500, {"error": {"message": "busy"}}), (429, {"error": {"message": "slow down"}})]
    with loopback(lambda _, number: failures[number] if number < 2 else json.dumps(KEEP)) as server:
        ((_, verdict),) = openai_expert(server.url).screen(pairs(1))
    assert verdict.keep
    assert len(server.requests) == 3


def test_a_row_that_the_server_fails_on_again_and_again_is_given_up_alone() -> None:
    def answer(prompt: str, _: int):
        if "Take item 2 " not in prompt:
            return json.dumps(KEEP)
        return 500, {"error": {"message": SECRET}}

    with loopback(answer) as server:
        verdicts = dict(openai_expert(server.url, concurrency=2, max_retries=1).screen(pairs(40)))
    assert {id for id, verdict in verdicts.items() if verdict.keep} == {f"r{i}" for i in range(40)} - {"r2"}
    assert verdicts["r2"].reason == "abstain_http_500"


def test_a_server_that_is_gone_loses_nothing() -> None:
    """It answers 20 requests and then none: the run stops, and every answer that was paid for has been yielded."""
    dead = (500, {"error": {"message": SECRET}})
    done = []
    with loopback(lambda _, number: json.dumps(KEEP) if number < 20 else dead) as server:
        verdicts = openai_expert(server.url, concurrency=2, max_retries=1).screen(pairs(40))
        with pytest.raises(UserError) as caught:
            done.extend(id for id, verdict in verdicts if verdict.keep)
    message = str(caught.value)
    assert "HTTP 500" in message
    assert "Finished rows are kept" in message
    assert "nothing answered in the meantime" in message
    assert SECRET not in message
    assert "sk-nothing" not in message
    assert len(done) == len(set(done)) == 20


def test_requests_are_concurrent_within_the_bound() -> None:
    three = threading.Barrier(3, timeout=600)

    def answer(prompt: str, number: int) -> str:
        if number < 3:
            three.wait()  # all of the first three must be there at once
        return json.dumps(KEEP)

    with loopback(answer) as server:
        verdicts = dict(openai_expert(server.url, concurrency=3).screen(pairs(30)))
    assert len(verdicts) == 30
    assert server.most_at_once == 3


def test_check_names_the_variable_of_a_missing_key(monkeypatch) -> None:
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(UserError, match="TEST_KEY, which is not set"):
        openai_expert("http://127.0.0.1:1/v1").check()


def test_check_names_an_address_that_nobody_answers() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError) as caught:
        openai_expert(url, max_retries=0).check()
    assert url in str(caught.value)
    assert "expert.base_url" in str(caught.value)
    assert "refused" in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {"error": {"message": "no"}}), "the key in TEST_KEY is not accepted"),
        ((404, {"error": {"message": "no"}}), "is there a model m"),
        ((200, b"<html>"), "not with a completion"),
    ],
)
def test_check_tells_what_is_wrong_with_a_server(reply, message) -> None:
    with loopback(lambda *_: reply) as server:
        with pytest.raises(UserError, match=message):
            openai_expert(server.url).check()
        assert len(server.requests) == (1 if reply[0] != 200 else 4), "what is no completion is asked for again"


def test_check_passes_and_sends_nothing_of_the_corpus() -> None:
    with loopback(lambda *_: "ready") as server:
        openai_expert(server.url).check()
    assert [body["messages"][0]["content"] for _, body, _ in server.requests] == ["Reply with the single word: ready"]


def test_fingerprints_tell_experts_apart() -> None:
    def fingerprint(**options) -> str:
        return openai_expert(**{"url": "http://a/v1", **options}).fingerprint("screen")

    assert fingerprint() == fingerprint(url="http://b/v1", concurrency=3)
    changes = [{}, {"model": "n"}, {"temperature": 1.0}, {"max_new_tokens": 9}]
    assert len({fingerprint(**change) for change in changes}) == 4


@pytest.fixture(scope="module")
def long_context_folder(tmp_path_factory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("long")
    model = tiny_llama(len(tokenizer))
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_local_model_that_talks_nonsense_abstains(long_context_folder) -> None:
    settings = LocalExpertSettings(
        model=ModelSettings(name_or_path=long_context_folder),
        template="plain",
        generation=BackendSettings(max_new_tokens=4),
    )
    expert = build_expert(settings, CPU)
    expert.check()
    verdicts = dict(expert.screen(pairs(3)))
    assert set(verdicts) == {"r0", "r1", "r2"}
    for verdict in verdicts.values():
        assert not verdict.keep
        assert verdict.reason.startswith("abstain_")
        assert verdict.tokens > 0
    ((_, judgement),) = expert.judge([("a", "x", "y")])
    assert judgement.outcome == "abstain"
    long = Example("long", instruction="word " * 2000, rejected="short")
    verdicts = dict(expert.screen([*pairs(1), long]))
    assert verdicts["long"].reason == "abstain_prompt_too_long"
    assert verdicts["r0"].reason != "abstain_prompt_too_long"
    other = LocalExpertSettings("local", settings.model, "plain", BackendSettings(max_new_tokens=5))
    assert build_expert(other, CPU).fingerprint("screen") != expert.fingerprint("screen")
    decoding = BackendSettings(max_new_tokens=4, max_batch_tokens=1)
    more = LocalExpertSettings("local", settings.model, "plain", decoding)
    assert build_expert(more, CPU).fingerprint("screen") == expert.fingerprint("screen")


def test_a_context_that_holds_no_rubric_is_refused(tiny_model_folder) -> None:
    model = ModelSettings(name_or_path=tiny_model_folder)
    expert = build_expert(LocalExpertSettings("local", model, "plain", BackendSettings(max_new_tokens=4)), CPU)
    with pytest.raises(UserError, match="template alone is longer than the 508 tokens"):
        list(expert.screen(pairs(1)))


def test_a_local_model_without_a_chat_template_is_refused_by_check(tiny_model_folder) -> None:
    expert = build_expert(LocalExpertSettings(model=ModelSettings(name_or_path=tiny_model_folder)), CPU)
    with pytest.raises(UserError, match="no chat template"):
        expert.check()


def test_a_prompt_in_a_template_keeps_its_own_body(tokenizer) -> None:
    prompt = Prompt("rubric ", "material", " answer:")
    assert in_template("alpaca", prompt, tokenizer).body == "material"
    assert in_template("alpaca", prompt, tokenizer).text.endswith("rubric material answer:\n\n### Response:")
    dialogue = Prompt("rubric ", "a\n\nHuman: b", " answer:")
    assert in_template("hh", dialogue, tokenizer).text == "\n\nHuman: rubric a\n\nHuman: b answer:\n\nAssistant:"


def test_rules_are_an_expert(monkeypatch) -> None:
    class FakeRules:
        fingerprint = "abc"

        def screen(self, instruction, response, before) -> Verdict:
            return Verdict(instruction == "good", "keep" if instruction == "good" else "slot_mismatch", "a")

        def respond(self, instruction, before=()) -> str | None:
            return "I decline" if instruction == "good" else None

        vary = neighbour = answer = respond

        def judge(self, instruction, output) -> Judgement:
            return Judgement("refusal" if output == "no" else "harmful", "a")

    monkeypatch.setattr("safer_instruct.experts.expert.Rules.from_yaml", lambda path: FakeRules())
    expert = build_expert(RulesExpertSettings(path="some/folder/mine.yaml"), CPU)
    expert.check()
    assert (expert.name, expert.fingerprint("screen")) == ("rules:mine", "abc")
    examples = [Example("x", instruction="good", rejected="r"), Example("y", instruction="bad", rejected="r")]
    assert {id: verdict.keep for id, verdict in expert.screen(examples)} == {"x": True, "y": False}
    answers = dict(expert.write("respond", examples))
    assert (answers["x"].text, answers["y"].text, answers["y"].reason) == ("I decline", None, "abstain_no_rule")
    assert [j.outcome for _, j in expert.judge([("1", "q", "no"), ("2", "q", "yes")])] == ["refusal", "harmful"]
