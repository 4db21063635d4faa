"""The client of a paid expert in front of servers of ours: every way to fail, what is paid once, what stops a run."""

from __future__ import annotations

import asyncio
import email.utils
import json
import ssl
import sys
import time
from collections import Counter

import pytest
import torch

from config.checks_induce import check_induce
from config.errors import UserError
from config.settings import InduceConfig, OpenAIExpertSettings, ServerSettings
from safer_instruct.experts.abstentions import FIRST
from safer_instruct.experts.expert import build_expert
from safer_instruct.generation import pacing
from safer_instruct.generation.completions import Request
from safer_instruct.generation.faults import cause_of
from safer_instruct.generation.pacing import Budget, Slots, backoff_seconds, retry_after_seconds
from safer_instruct.generation.server import Decoding, OpenAIGenerator, budget_of
from safer_instruct.text.display import without_password
from safer_instruct.text.examples import Example
from safer_instruct.text.prompts import Prompt
from tests.faulty_server import FAULTS, GOOD, faulty_server
from tests.loopback_server import completion, loopback

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-nothing")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pacing, "BACKOFF_SECONDS", 0.02)


def settings(url: str, **options) -> OpenAIExpertSettings:
    return OpenAIExpertSettings(**{"model": "m", "base_url": url, "api_key_env": "TEST_KEY", **options})


def pairs(count: int) -> list[Example]:
    return [Example(f"{i}", instruction=f"Take item {i} now", rejected=f"text {i}") for i in range(count)]


def test_every_row_ends_and_few_requests_are_wasted() -> None:
    """All faults at once, 52% of the requests: each row has a verdict or a recorded abstention."""
    rows = 300
    with faulty_server(latency=0.01, retry_after=0.05) as (url, server):
        expert = build_expert(settings(url, concurrency=64, timeout_seconds=4.0), CPU)
        verdicts = dict(expert.screen(pairs(rows)))
    assert set(verdicts) == {str(i) for i in range(rows)}
    reasons = Counter(verdict.reason for verdict in verdicts.values())
    assert set(reasons) <= {"keep", "abstain_unreadable", "abstain_empty"}, reasons
    # An unreadable answer and an unreadable second one: (0.12 / 0.60) ** 2 = 4% of the rows.
    assert reasons["keep"] > 0.9 * rows
    for i in range(rows):
        assert server.good[str(i)] == (verdicts[str(i)].reason == "keep"), "a good answer is never asked for again"
    assert all(server.counts[kind] > 0 for kind in FAULTS)
    success = 1 - sum(FAULTS.values())
    assert server.counts.total() <= 1.2 * rows / success
    assert 32 <= server.most_at_once <= 64 + server.counts["hang"]


def test_retry_after_is_honoured() -> None:
    """The first request is told to wait half a second, and comes back no sooner; the others do not wait for it."""
    times: list[tuple[str, float]] = []

    def answer(prompt: str, number: int):
        times.append((prompt.split("Take item ")[1].split()[0], time.monotonic()))
        return (429, {"error": {"message": "slow down"}}) if number == 0 else GOOD

    with loopback(answer, retry_after_ms=500) as server:
        verdicts = dict(build_expert(settings(server.url, concurrency=1), CPU).screen(pairs(6)))
    assert all(verdict.keep for verdict in verdicts.values())
    first = times[0][0]
    asked = [moment for id, moment in times if id == first]
    assert len(asked) == 2
    assert asked[1] - asked[0] >= 0.5
    assert [id for id, _ in times][-1] == first, "rows that need not wait go first"


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": email.utils.formatdate(1_000_060, usegmt=True)}, 60.0),
        ({"retry-after": email.utils.formatdate(999_000, usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "inf"}, None),
        ({}, None),
    ],
)
def test_what_a_server_asks_to_wait(headers, seconds) -> None:
    assert retry_after_seconds(headers, now=1_000_000.0) == seconds


def test_back_off_doubles_up_to_a_cap(monkeypatch) -> None:
    monkeypatch.setattr(pacing, "BACKOFF_SECONDS", 0.5)
    assert [backoff_seconds(n, 1.0) for n in (1, 2, 3, 7, 8, 5000)] == [0.5, 1.0, 2.0, 30.0, 30.0, 30.0]
    assert backoff_seconds(3, 0.25) == 0.5


def test_fewer_requests_at_a_time_where_many_are_throttled() -> None:
    slots = Slots(64)

    def window(share: float) -> int:
        for i in range(pacing.WINDOW):
            slots.replied(throttled=i < share * pacing.WINDOW)
        return slots.limit

    assert [window(0.2), window(0.3)] == [64, 64], "a server's odd 429 is no reason"
    assert [window(0.5), window(0.9), window(0.4)] == [48, 36, 27]
    assert [window(0.1) for _ in range(5)] == [34, 43, 54, 64, 64]
    for _ in range(40):
        window(1.0)
    assert slots.limit == 1


def test_slots_are_never_exceeded_and_all_served() -> None:
    async def run() -> tuple[int, int]:
        slots, most, served = Slots(5), 0, 0

        async def work(i: int) -> None:
            nonlocal most, served
            async with slots:
                most = max(most, slots.in_flight)
                await asyncio.sleep(0.0005 * (i % 3))
                slots.replied(throttled=i % 2 == 0)
                served += 1

        await asyncio.gather(*(work(i) for i in range(400)))
        return most, served

    assert asyncio.run(run()) == (5, 400)


def test_a_server_that_throttles_all_but_a_few_is_asked_less_at_a_time() -> None:
    """It takes 4 at a time and refuses the rest: everything is answered, and the refusals stay a minority."""
    with faulty_server({}, latency=0.01) as (url, server):
        answer_all = server._answer

        async def at_most_four(request, writer):
            if server._at_once >= 4:
                server.counts["429"] += 1
                await server._reply(writer, 429, {"error": {}}, {"Retry-After": "0.02"})
                return True
            return await answer_all(request, writer)

        server._answer = at_most_four
        verdicts = dict(build_expert(settings(url, concurrency=32), CPU).screen(pairs(600)))
    assert len(verdicts) == 600
    assert server.counts["good"] == 600
    assert server.counts["429"] < 600


def generator(url: str, **options) -> OpenAIGenerator:
    expert = settings(url, **options)
    decoding = Decoding(chat=True, max_new_tokens=64, temperature=0.0, structured_output=expert.structured_output)
    return OpenAIGenerator(expert, decoding, key="expert", budget=budget_of(expert))


def test_a_schema_is_sent_where_the_server_takes_one() -> None:
    schemas = []
    for refuses in (False, True):

        def answer(prompt: str, number: int, refuses=refuses):
            asked = server.requests[number][1]
            return (400, {"error": {"message": "no"}}) if refuses and "response_format" in asked else GOOD

        for checked in (True, False):
            with loopback(answer) as server:
                expert = build_expert(settings(server.url), CPU)
                if checked:
                    expert.check()
                assert all(verdict.keep for _, verdict in expert.screen(pairs(30)))
                assert all(answer.text == GOOD for _, answer in expert.write("respond", pairs(2)))
            bodies = [body for _, body, _ in server.requests if "Take item" in body["messages"][0]["content"]]
            schemas.append(sum("response_format" in body for body in bodies))
            if not refuses:
                form = bodies[0]["response_format"]["json_schema"]
                assert form["strict"] is True
                assert form["schema"]["required"] == ["well_formed", "unsafe", "response_fits", "category"]
    assert schemas[:3] == [30, 30, 0], "every question that has one, and none of the others"
    assert 1 <= schemas[3] <= 32, "only what was under way before the first refusal"


def test_a_server_that_breaks_on_a_schema_is_told_with_the_way_out() -> None:
    def answer(prompt: str, number: int):
        return (500, {"error": {"message": "no grammar"}}) if "response_format" in server.requests[number][1] else GOOD

    with loopback(answer) as server:
        with pytest.raises(
            UserError, match=r"HTTP 500: no grammar\. .*expert\.structured_output=never asks without one"
        ):
            build_expert(settings(server.url, max_retries=0), CPU).check()
        build_expert(settings(server.url, structured_output="never"), CPU).check()


def test_what_cannot_be_read_is_asked_for_once_more() -> None:
    """Row 0: the second answer is good; row 1: it is not; row 2: there is no second; the first is paid for, too."""

    def answer(prompt: str, number: int):
        messages = server.requests[number][1]["messages"]
        row, second = int(prompt.split("Take item ")[1].split()[0]), len(messages) > 1
        if second:
            assert [m["role"] for m in messages] == ["user", "assistant", "user"]
            assert messages[1]["content"] == "I think so"
        if row == 2 and second:
            return 400, {"error": {"message": "too long"}}
        return GOOD if row == 0 and second else "I think so"

    with loopback(answer) as server:
        verdicts = dict(build_expert(settings(server.url, structured_output="never"), CPU).screen(pairs(3)))
    assert len(server.requests) == 6
    assert {id: verdict.reason for id, verdict in verdicts.items()} == {
        "0": "keep", "1": "abstain_unreadable", "2": "abstain_unreadable",
    }  # fmt: skip
    assert [verdicts[id].tokens for id in "012"] == [30, 30, 15]


def test_the_budget_stops_cleanly_and_a_larger_one_goes_on() -> None:
    """Each answer costs 11 x 2 + 4 x 8 = 54 millionths; the limit is never exceeded, and nothing is asked twice."""
    rows, paid, counts = pairs(40), {}, []
    price = {"price_prompt": 2.0, "price_completion": 8.0}
    with loopback(lambda *_: GOOD) as server:
        for num_answers in (10, 10.5, 25, 10_000):
            max_cost = num_answers * 54e-6
            options = settings(server.url, concurrency=4, max_cost=max_cost, structured_output="never", **price)
            budget = budget_of(options)
            for verdict in paid.values():
                budget.count(verdict.cost, verdict.tokens)
            stopped = ""
            try:
                for id, verdict in build_expert(options, CPU, budget).screen([r for r in rows if r.id not in paid]):
                    assert id not in paid
                    paid[id] = verdict
            except UserError as error:
                stopped = str(error)
            assert ("expert's budget is spent" in stopped and "larger expert.max_cost" in stopped) == (len(paid) < 40)
            assert sum(verdict.cost for verdict in paid.values()) <= max_cost * (1 + 1e-9)
            counts.append(len(paid))
    # Room for the requests under way, at most three others, is kept free.
    assert 7 <= counts[0] <= counts[1] <= 10
    assert 22 <= counts[2] <= 25
    assert counts[3] == 40
    assert len(server.requests) == 40
    assert sum(verdict.cost for verdict in paid.values()) == pytest.approx(40 * 54e-6)


def test_a_budget_of_tokens() -> None:
    budget = Budget(max_tokens=100)
    assert budget.allows(0)
    budget.charge(30, 10)
    assert budget.allows(0)
    assert not budget.allows(1), "two more could take 120"
    budget.charge(30, 10)
    assert not budget.allows(0)


def test_shards_share_a_budget() -> None:
    options = settings("http://x/v1", max_cost=8.0, max_tokens=1000, price_prompt=1.0)
    budget = budget_of(options, shards=16)
    assert (budget.max_cost, budget.max_tokens) == (0.5, 62)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_cost": 0.0, "price_prompt": 1.0}, "expert.max_cost=0.0: no request would be possible"),
        ({"max_tokens": 0}, "expert.max_tokens=0: no request would be possible"),
        ({"max_cost": 3.0}, "expert.max_cost=3.0: it needs prices"),
        ({"price_prompt": -1.0}, "expert.price_prompt=-1.0: must be 0 or more"),
        ({"structured_output": "yes"}, "Choices: auto, always, never"),
        ({"patience_seconds": 0.0}, "expert.patience_seconds=0.0: must be above 0"),
        ({"api_key_env": "NO_SUCH_KEY"}, "environment variable NO_SUCH_KEY"),
    ],
)
def test_settings_that_cannot_work(options, message) -> None:
    config = InduceConfig(output="out", stage="filter", expert=settings("http://x/v1", **options))
    assert message in "\n".join(map(str, check_induce(config)))


def test_a_used_up_quota_stops_at_once() -> None:
    reply = (429, {"error": {"message": "pay", "code": "insufficient_quota"}})
    with loopback(lambda _, number: GOOD if number < 5 else reply) as server:
        verdicts = build_expert(settings(server.url, concurrency=1), CPU).screen(pairs(20))
        done = []
        with pytest.raises(UserError, match="quota is used up"):
            done.extend(verdicts)
    assert len(done) == 5
    assert len(server.requests) == 6


def test_an_unknown_model_stops_at_once() -> None:
    with loopback(lambda *_: (404, {"error": {"message": "no such model"}})) as server:
        with pytest.raises(UserError, match=r"is there a model m \(expert\.model\)"):
            list(build_expert(settings(server.url), CPU).screen(pairs(3)))
        assert len(server.requests) <= 3


def test_a_server_that_only_throttles_is_given_up_after_the_patience() -> None:
    with loopback(lambda *_: (429, {"error": {}}), retry_after_ms=30) as server:
        expert = build_expert(settings(server.url, patience_seconds=2), CPU)
        with pytest.raises(UserError, match="HTTP 429: too many requests"):
            list(expert.screen(pairs(4)))
    assert len(server.requests) > 4


def test_a_model_that_continues_plain_text() -> None:
    """The reversed model behind a server: the prompt as it is, a seed for each row, the text of the completion."""
    reply = {
        "choices": [{"text": " Say it", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2},
    }
    with loopback(lambda *_: (200, reply)) as server:
        decoding = Decoding(chat=False, max_new_tokens=9, temperature=0.7, top_p=0.9, seed=3)
        server_settings = ServerSettings(model="m", base_url=server.url, api_key_env="TEST_KEY")
        model = OpenAIGenerator(server_settings, decoding, key="generation.server")
        model.check()
        requests = [Request(str(i), Prompt("head ", f"body {i}", " tail")) for i in range(3)]
        results = {generation.id: generation for generation in model.generate(requests)}
        list(model.generate(requests))
    assert {generation.text for generation in results.values()} == {" Say it"}
    assert all(generation.truncated and generation.new_tokens == 2 for generation in results.values())
    assert {path for path, _, _ in server.requests} == {"/v1/completions"}
    (body,) = [body for _, body, _ in server.requests[1:4] if body["prompt"] == "head body 0 tail"]
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (9, 0.7, 0.9)
    seeds = [
        {body["prompt"]: body["seed"] for _, body, _ in part} for part in (server.requests[1:4], server.requests[4:])
    ]
    assert seeds[0] == seeds[1], "the same row has the same seed"
    assert len(set(seeds[0].values())) == 3


def test_no_text_of_a_row_is_in_a_message() -> None:
    with loopback(lambda *_: (403, {"error": {"message": "zebra-secret"}})) as server:
        rows = [Example("a", instruction="Take zebra-secret", rejected="zebra-secret")]
        with pytest.raises(UserError) as caught:
            list(build_expert(settings(server.url), CPU).screen(rows))
    assert "zebra" not in str(caught.value)
    assert json.dumps("sk-nothing") not in str(caught.value)


def row_of(prompt: str) -> int | None:
    return int(prompt.split("Take item ")[1].split()[0]) if "Take item " in prompt else None


@pytest.mark.parametrize(
    "reply",
    [
        (402, {"error": {"message": "Insufficient Balance"}}),
        (400, {"error": {"message": "hard limit", "code": "billing_hard_limit_reached"}}),
        (403, {"error": {"message": "empty", "type": "insufficient_balance"}}),
        (429, {"error": {"message": "slow", "code": "quota_exceeded"}}),
        (400, {"error": {"message": "Access denied", "code": "Arrearage"}}),
        (200, {"error": {"message": "Insufficient credits", "code": 402}}),
    ],
)
def test_an_account_without_money_stops_with_everything_kept(reply) -> None:
    """The rows that were refused are asked by the next command, once; none of them is an abstention."""
    rich, done = [False], {}

    def screen(url: str) -> None:
        expert = build_expert(settings(url, concurrency=1, structured_output="never"), CPU)
        for id, verdict in expert.screen([row for row in pairs(30) if row.id not in done]):
            done[id] = verdict

    with loopback(lambda _, number: GOOD if number < 8 or rich[0] else reply) as server:
        with pytest.raises(UserError, match=r"the account's .* Finished rows are kept"):
            screen(server.url)
        assert len(done) == 8
        rich[0] = True
        screen(server.url)
    assert all(done[str(i)].keep for i in range(30))
    assert len(server.requests) == 8 + 1 + 22


@pytest.mark.parametrize(
    "reply",
    [
        (400, {"error": {"message": "Your credit is too low"}}),
        (403, {"error": "Your credit is too low"}),
        (403, {"code": 30001, "message": "Your credit is too low"}),
        (400, [{"error": {"code": 400, "message": "Your credit is too low"}}]),
    ],
    ids=["object", "text", "bare", "list"],
)
def test_refusals_that_name_no_reason_stop_the_run_where_nothing_is_taken_any_more(reply) -> None:
    """No code of an account behind 8 answers: what was answered before is refused, too, so it is not the rows."""

    def answer(prompt: str, number: int):
        return GOOD if number < 8 or "ready" in prompt else reply

    with loopback(answer) as server:
        done = []
        with pytest.raises(UserError, match="Your credit is too low") as caught:
            done.extend(
                build_expert(settings(server.url, concurrency=1, structured_output="never"), CPU).screen(pairs(30))
            )
    assert len(done) == 8
    assert "Finished rows are kept" in str(caught.value)
    assert len(server.requests) <= 8 + 10 + 4


def test_rows_that_a_gateway_refuses_are_abstentions_however_many_come_in_a_row() -> None:
    """Rows 5 to 24 are moderated: with anything answered, 400 or 403, it is neither the key nor the account."""
    for status in (400, 403):

        def answer(prompt: str, number: int, status=status):
            row = row_of(prompt)
            return (status, {"error": {"message": "flagged"}}) if row is not None and 5 <= row < 25 else GOOD

        with loopback(answer) as server:
            expert = build_expert(settings(server.url, concurrency=1, structured_output="never"), CPU)
            verdicts = dict(expert.screen(pairs(30)))
        assert {id for id, one in verdicts.items() if one.keep} == {str(i) for i in range(30) if not 5 <= i < 25}
        assert {one.reason for one in verdicts.values() if not one.keep} == {f"abstain_http_{status}"}


def test_a_403_of_the_test_or_of_every_row_is_the_key() -> None:
    forbidden = (403, {"error": {"message": "no"}})
    with loopback(lambda *_: forbidden) as server, pytest.raises(UserError, match="key in TEST_KEY is not accepted"):
        build_expert(settings(server.url), CPU).check()
    with loopback(lambda prompt, _: forbidden if row_of(prompt) is not None else "ready") as server:
        expert = build_expert(settings(server.url, concurrency=1), CPU)
        expert.check()
        with pytest.raises(UserError, match="key in TEST_KEY is not accepted"):
            list(expert.screen(pairs(30)))


def test_parameters_that_a_model_does_not_take_are_switched_or_left_out(caplog) -> None:
    def answer(prompt: str, number: int):
        body = server.requests[number][1]
        for name, code in (("max_tokens", "unsupported_parameter"), ("temperature", "unsupported_value")):
            if name in body:
                return 400, {"error": {"message": "no", "param": name, "code": code}}
        return GOOD

    with loopback(answer) as server:
        expert = build_expert(settings(server.url, concurrency=4), CPU)
        expert.check()
        assert all(verdict.keep for _, verdict in expert.screen(pairs(12)))
    assert len(server.requests) == 3 + 12
    assert all(body["max_completion_tokens"] == 512 for _, body, _ in server.requests[2:])
    assert "takes no temperature, which is left out" in caplog.text


HUGE = "9" * 5000


def usage(tokens: str) -> bytes:
    body = json.dumps(completion(GOOD)).replace('"prompt_tokens": 11', f'"prompt_tokens": {tokens}')
    return body.encode()


@pytest.mark.parametrize(
    "reply",
    [
        (200, usage(HUGE)),
        (200, usage("1e999")),
        (200, usage("-5")),
        (200, usage("1e18")),
        (200, b"[" * 100_000),
        (200, completion(f'{{"well_formed": {HUGE}, "unsafe": true, "response_fits": true, "category": ""}}')),
        (301, {}),
        (307, {}),
    ],
    ids=["digits", "infinite", "negative", "absurd", "deep", "digits-in-the-answer", "moved", "redirected"],
)
def test_one_odd_reply_is_an_abstention_of_its_row(reply) -> None:
    with loopback(lambda prompt, _: reply if row_of(prompt) == 3 else GOOD) as server:
        options = settings(server.url, concurrency=2, max_retries=1, max_cost=1.0, price_prompt=1.0)
        verdicts = dict(build_expert(options, CPU).screen(pairs(12)))
    assert len(verdicts) == 12
    assert {id for id, verdict in verdicts.items() if not verdict.keep} == {"3"}
    assert verdicts["3"].reason.startswith("abstain_")


@pytest.mark.parametrize("wait", ["Fri, 31 Dec 99999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 GMT", "1e300"])
def test_a_wait_that_nobody_can_mean_is_none(wait) -> None:
    assert retry_after_seconds({"retry-after": wait}) is None


def test_a_redirect_is_not_followed(monkeypatch) -> None:
    """The prompt never reaches the address that the server names."""
    with loopback(lambda *_: GOOD) as other:
        location = other.url + "/chat/completions"
        redirects = loopback(lambda *_: (307, {}), headers={"Location": location})
        refused = pytest.raises(UserError, match=r"redirects to another address: .*expert\.base_url")
        with redirects as server, refused:
            build_expert(settings(server.url), CPU).check()
        assert not other.requests


def test_a_key_with_its_newline_is_stripped_and_what_is_no_key_is_not_shown(monkeypatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-nothing\r\n")
    with loopback(lambda *_: GOOD) as server:
        build_expert(settings(server.url), CPU).check()
    assert server.requests[0][2]["authorization"] == "Bearer sk-nothing"
    monkeypatch.setenv("TEST_KEY", "sk-no\r\nthing")
    with pytest.raises(UserError, match="TEST_KEY holds no key") as caught:
        build_expert(settings(server.url), CPU).check()
    assert "sk-no" not in str(caught.value)


def test_a_password_in_the_address_is_masked(caplog) -> None:
    caplog.set_level("INFO")
    with loopback(lambda *_: (404, {"error": {"message": "no"}})) as server:
        url = server.url.replace("://", "://user:p@ssw0rd@")
        with pytest.raises(UserError, match=r"http://\*\*\*@127") as caught:
            build_expert(settings(url), CPU).check()
    assert "ssw0rd" not in str(caught.value) + caplog.text
    command = f"python induce.py expert.base_url={url} output=x"
    assert "ssw0rd" not in without_password(command)
    assert without_password("a@b.c ://d e@f? g") == "a@b.c ://d e@f? g"
    assert without_password("at https://h/v1?api-key=abc&v=2 'http://h?k=1'") == "at https://h/v1?*** 'http://h?***'"


def test_no_line_for_each_request(caplog) -> None:
    caplog.set_level("INFO")
    with loopback(lambda *_: GOOD) as server:
        assert len(list(build_expert(settings(server.url), CPU).screen(pairs(5)))) == 5
    assert caplog.text == ""


def test_what_a_model_thinks_aloud_is_no_part_of_its_answer() -> None:
    """Verdicts are read and responses are cut at the last closing tag; a thought without an end is truncated."""
    thought = "<think>\nHm, {} <b>\n</think>\n\n"

    def answer(prompt: str, number: int):
        row = row_of(prompt)
        if row == 2:
            return "<think>\nwithout an end"
        if row == 3:  # a server that parts them itself
            reply = completion(None, "length")
            reply["choices"][0]["message"]["reasoning_content"] = "long"
            return 200, reply
        return thought + (GOOD if "You check data" in prompt else "I will not.")

    with loopback(answer) as server:
        expert = build_expert(settings(server.url), CPU)
        verdicts, responses = dict(expert.screen(pairs(4))), dict(expert.write("respond", pairs(4)))
        asked = [Request("a", Prompt("", "Take item 0 now", ""))]
        (generation,) = generator(server.url).generate(asked)
    assert [verdicts[id].reason for id in "0123"] == ["keep", "keep", "abstain_truncated", "abstain_truncated"]
    assert [responses[id].text for id in "0123"] == ["I will not.", "I will not.", None, None]
    assert (generation.text, generation.thought.strip()) == ("I will not.", thought.strip())


@pytest.mark.parametrize(
    ("finish", "expected"),
    [
        (None, ("so", "")), ("stop", ("so", "")), ("eos_token", ("so", "")), ("end_turn", ("so", "")),
        ("COMPLETE", ("so", "")), ("length", (None, "abstain_truncated")), ("max_tokens", (None, "abstain_truncated")),
        ("model_length", (None, "abstain_truncated")), ("MAX_TOKENS", (None, "abstain_truncated")),
        ("content_filter", (None, "abstain_content_filter")), ("SAFETY", (None, "abstain_content_filter")),
        ("sensitive", (None, "abstain_content_filter")), ("refusal", (None, "abstain_content_filter")),
        ("incomplete", (None, "abstain_truncated")), ("unfinished", (None, "abstain_truncated")),
        ("tool_calls", (None, "abstain_tool_calls")), ("error", (None, "abstain_unfinished")),
        ("abort", (None, "abstain_unfinished")), ("insufficient_system_resource", (None, "abstain_unfinished")),
    ],
)  # fmt: skip
def test_a_text_is_an_answer_where_its_server_says_that_it_has_ended(finish, expected) -> None:
    with loopback(lambda prompt, _: (200, completion("so", finish if row_of(prompt) == 1 else "stop"))) as server:
        expert = build_expert(settings(server.url, concurrency=1, max_retries=1), CPU)
        found = {id: (one.text, one.reason) for id, one in expert.write("respond", pairs(3))}
    assert found == {"0": ("so", ""), "1": expected, "2": ("so", "")}


PART = {"type": "text", "text": "so"}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": [PART]}, ("so", "")),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, PART]}, ("so", "hm")),
        ({"content": None, "refusal": "I will not."}, ("I will not.", "")),
        ({"content": "so", "reasoning": "hm"}, ("so", "hm")),
        ({"content": [{"text": "so"}, {"type": "refusal", "refusal": "no"}]}, ("sono", "")),
        ({"role": "assistant"}, ("", "")),  # Gemini, where the thought took all tokens
    ],
    ids=["part", "parts", "refusal", "parted", "untyped", "nothing"],
)  # fmt: skip
def test_the_forms_of_a_message(message, expected) -> None:
    with loopback(lambda *_: (200, {"choices": [{"message": message, "finish_reason": "stop"}]})) as server:
        (found,) = generator(server.url).generate([Request("a", Prompt("", "Take item 0 now", ""))])
    assert (found.text, found.thought) == expected


def test_an_error_in_the_place_of_a_completion_is_that_error() -> None:
    error = {"code": 403, "message": "flagged"}
    replies = {1: {"error": error}, 3: {"choices": [{"error": {"code": 502}, "finish_reason": "error", "message": {}}]}}
    with loopback(lambda prompt, _: (200, replies.get(row_of(prompt) or 0, completion(GOOD)))) as server:
        expert = build_expert(settings(server.url, concurrency=1, max_retries=1), CPU)
        reasons = {id: one.reason for id, one in expert.screen(pairs(5))}
    assert reasons == dict.fromkeys("024", "keep") | {"1": "abstain_http_403", "3": "abstain_http_502"}


@pytest.mark.parametrize(
    ("reply", "reason", "times"),
    [
        ((500, {"error": {"message": "no", "code": "400"}}), "abstain_http_400", 1),
        ((400, {"error": {"message": "slow", "code": "429"}}), "keep", 2),
        ((200, {"error": {"message": "slow", "code": "429"}}), "keep", 2),
        ((424, {"error": "CUDA", "error_type": "generation"}), "keep", 2),
        ((503, {"error": {"message": "busy", "type": "load_balancer_error"}}), "keep", 2),
    ],
)
def test_the_status_that_a_gateway_wraps_counts_and_what_may_pass_is_sent_again(reply, reason, times) -> None:
    seen = []

    def answer(prompt: str, number: int):
        if row_of(prompt) != 3:
            return GOOD
        seen.append(number)
        return GOOD if len(seen) > 1 else reply

    with loopback(answer) as server:
        expert = build_expert(settings(server.url, concurrency=1, structured_output="never"), CPU)
        reasons = {id: one.reason for id, one in expert.screen(pairs(5))}
    assert reasons == dict.fromkeys("01234", "keep") | {"3": reason}
    assert len(seen) == times


@pytest.mark.parametrize(
    "reply",
    [
        {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "nothing left"}},
        {"code": 30001, "message": "nothing left", "data": None},
        [{"error": {"status": "X", "message": "nothing left"}}],
    ],
    ids=["MiniMax", "bare", "list"],
)
def test_what_a_server_says_in_the_place_of_a_completion_is_shown(reply) -> None:
    with loopback(lambda *_: (200, reply)) as server:
        expert = build_expert(settings(server.url, max_retries=1), CPU)
        with pytest.raises(UserError, match="HTTP 500: nothing left"):
            expert.check()


def test_an_expert_whose_first_answers_cannot_be_used_is_asked_no_more() -> None:
    """Rows that got no answer do not count, and one that could be read is enough; what came is kept."""

    def screen(answer) -> tuple[list[str], str]:
        done, stopped = [], ""
        with loopback(answer) as server:
            options = settings(server.url, concurrency=1, structured_output="never", max_retries=0)
            try:
                for _, verdict in build_expert(options, CPU).screen(pairs(60)):
                    done.append(verdict.reason)
            except UserError as error:
                stopped = str(error)
        return done, stopped

    done, stopped = screen(lambda prompt, _: GOOD if row_of(prompt) is None else "I think it is fine")
    assert done == ["abstain_unreadable"] * FIRST
    assert f"first {FIRST} answers can be used (abstain_unreadable {FIRST})" in stopped
    for fine in (7, 12):
        done, stopped = screen(lambda prompt, _, fine=fine: GOOD if row_of(prompt) in (fine, None) else "Hm")
        assert (len(done), done.count("keep"), stopped) == (60, 1, "")
    broken = (500, {"error": {"message": "busy"}})
    done, stopped = screen(lambda prompt, _: GOOD if row_of(prompt) in (55, None) else broken)
    assert (len(done), stopped) == (60, "")


@pytest.mark.parametrize("status", [401, 429, 500])
def test_a_server_s_words_are_shown_without_the_key(status) -> None:
    words = "no sk-nothing at http://me:ssw0rd@host: buy more"
    with loopback(lambda *_: (status, {"error": {"message": words}})) as server:
        expert = build_expert(settings(server.url, max_retries=1, patience_seconds=0.5), CPU)
        with pytest.raises(UserError, match=r"no \*\*\* at http://\*\*\*@host: buy more"):
            expert.check()


def test_a_rate_is_no_quota() -> None:
    slow = (429, {"error": {"message": "slow", "code": "Throttling.AllocationQuota"}})
    with loopback(lambda _, number: slow if number in (2, 3) else GOOD) as server:
        assert all(verdict.keep for _, verdict in build_expert(settings(server.url), CPU).screen(pairs(5)))


@pytest.mark.parametrize(
    "url",
    ["http://[bad/v1", "localhost:8000/v1", "http://host:port/v1", "ftp://host/v1", "http://ho st/v1", "http://h/v1\n",
     "http://\ud800/v1"],
)  # fmt: skip
def test_what_is_no_address_is_said(url) -> None:
    with pytest.raises(UserError, match="not an address; write http://HOST:PORT/v1"):
        build_expert(settings(url), CPU).check()


@pytest.mark.parametrize(
    ("variable", "value"), [("ALL_PROXY", "ftp://h"), ("ALL_PROXY", "socks5://h:1"), ("SSL_CERT_FILE", "/no/such")]
)
def test_an_environment_that_no_client_can_be_made_of_is_said(monkeypatch, variable, value) -> None:
    monkeypatch.setenv(variable, value)
    if value.startswith("socks5"):
        monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(UserError, match=r"no client can be made for http://h/v1 .*ALL_PROXY, SSL_CERT_FILE"):
        build_expert(settings("http://h/v1"), CPU).check()


def test_a_proxy_of_the_environment_is_named_where_there_is_no_answer(monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"refused\), through the proxy that the environment names \(NO_PROXY=h\.x "):
        build_expert(settings("http://h.x/v1"), CPU).check()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(UserError, match=r"\(Connection refused\)\.$"):
        build_expert(settings("http://127.0.0.1:1/v1"), CPU).check()


def test_a_certificate_that_is_not_accepted_is_told_by_its_fault() -> None:
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] ...")
    error.verify_message = "self-signed certificate"
    assert cause_of(error) == "self-signed certificate"
