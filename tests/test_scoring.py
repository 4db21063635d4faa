"""The round-trip score, against its definition token by token; candidates and thresholds in the stages."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import induce
from config.checks_induce import check_induce
from config.errors import UserError
from config.schema import compose_config
from config.settings import InductionSettings, ModelSettings, RoundTripSettings
from safer_instruct.experts.verdicts import Verdict
from safer_instruct.generation.completions import Generation
from safer_instruct.generation.models import load_causal_lm, load_tokenizer
from safer_instruct.induction.ledger import Ledger, read_ledger, run_stage
from safer_instruct.induction.round_trip import RoundTrip
from safer_instruct.induction.stages import (
    Score,
    candidate_id,
    candidates,
    least_score,
    low_score,
    stage_filter,
    stage_induce,
    stage_score,
    with_instructions,
)
from safer_instruct.text.examples import Example, Message
from safer_instruct.text.prompts import render_alpaca

PAIRS = [
    ("What is the sum of 12 and 30?", "The sum is 42."),
    ("List three fruits.", "apple, banana, cherry and some more words behind them"),
    ("", "a"),
    ("the cat sat on the mat " * 6, "The sum is 42."),
]


@pytest.fixture(scope="module")
def model(tiny_model_folder) -> ModelSettings:
    return ModelSettings(name_or_path=tiny_model_folder)


def literal(model, tokenizer, instruction: str, response: str) -> float:
    """log P(response, EOS | prompt) per token, one token at a time, in float64."""
    lm = load_causal_lm(model).double().eval()
    prompt = tokenizer(render_alpaca(instruction).text)["input_ids"]
    ids = tokenizer(render_alpaca(instruction).text + response)["input_ids"] + [tokenizer.eos_token_id]
    assert ids[: len(prompt)] == prompt
    total = 0.0
    with torch.no_grad():
        for position in range(len(prompt), len(ids)):
            scores = lm(torch.tensor([ids[:position]])).logits[0, -1]
            total += float(scores.log_softmax(-1)[ids[position]])
    return total / (len(ids) - len(prompt))


@pytest.mark.parametrize("max_batch_tokens", [1, 300, 100_000])
def test_the_score_is_its_definition(model, max_batch_tokens) -> None:
    tokenizer = load_tokenizer(model)
    settings = RoundTripSettings(model, max_batch_tokens=max_batch_tokens)
    scorer = RoundTrip(settings, torch.device("cpu"), induce.logps_of)
    items = [(("row", i), Example("", asked, rejected=said)) for i, (asked, said) in enumerate(PAIRS)]
    scores = dict(scorer.score(items))
    for (key, _), (instruction, response) in zip(items, PAIRS, strict=True):
        given, alone = (literal(model, tokenizer, text, response) for text in (instruction, ""))
        assert scores[key].nats_per_token == pytest.approx(given - alone, abs=2e-5)  # float32 against float64
        assert scores[key].tokens > len(response.split())
    assert scores["row", 2].nats_per_token == 0.0, "an empty instruction explains nothing"


TALK = (Message("user", "List three fruits."), Message("assistant", "apple, banana"))
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What is asked: by the chat template above, and typed by hand. The run's system prompt goes before the row's own.
PREFIX = "<user>List three fruits.</s>\n<assistant>apple, banana</s>\n<user>"


@pytest.mark.parametrize(
    ("system", "before"),
    [(None, "<system>You count.</s>\n"), ("Be brief.", "<system>Be brief.</s>\n"), ("", "")],
)
def test_the_score_of_a_later_turn_is_its_definition(tiny_model_folder, tmp_path, system, before) -> None:
    """The earlier turns stand in both prompts, with the instruction and without; plain transformers in float64."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(CHAT)
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def per_token(prompt: str, response: str) -> float:
        given = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]
        assert ids[: len(given)] == given
        logps = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logps[i - 1, ids[i]]) for i in range(len(given), len(ids))) / (len(ids) - len(given))

    asked = "Which of them is red?"
    pair = Example("", asked, rejected="The apple.", system="You count.", history=TALK)
    model = ModelSettings(str(folder), policy_dtype="float64")
    scorer = RoundTrip(RoundTripSettings(model, "chat", system), torch.device("cpu"), induce.logps_of)
    first = replace(pair, history=())
    found = dict(
        scorer.score([(("later", 0), pair), (("first", 0), first), (("later", 1), replace(pair, instruction=""))])
    )
    expected = [per_token(f"{before}{PREFIX}{text}</s>\n<assistant>", "The apple.") for text in (asked, "")]
    assert found["later", 0].nats_per_token == pytest.approx(expected[0] - expected[1], abs=1e-12)
    assert found["later", 1].nats_per_token == 0.0
    expected = [per_token(f"{before}<user>{text}</s>\n<assistant>", "The apple.") for text in (asked, "")]
    assert found["first", 0].nats_per_token == pytest.approx(expected[0] - expected[1], abs=1e-12)
    scorer.check([pair, first])


def test_a_template_without_a_place_is_said_before_anything_runs(model) -> None:
    talk = Example("", rejected="word", history=TALK, provenance={"source": "t.jsonl:7"})
    told = Example("", rejected="word", system="Be brief.", provenance={"source": "t.jsonl:8"})
    scorer = RoundTrip(RoundTripSettings(model), torch.device("cpu"), induce.logps_of)
    with pytest.raises(UserError, match=r"^corpus.path: t.jsonl:7: roundtrip.template=alpaca has one turn; write"):
        scorer.check([Example(""), talk])
    with pytest.raises(
        UserError, match=r"t.jsonl:8: roundtrip.template=alpaca has no place .* with roundtrip.system=''"
    ):
        scorer.check([told])
    RoundTrip(RoundTripSettings(model, system=""), torch.device("cpu"), induce.logps_of).check([told])


def test_a_pair_that_does_not_fit_has_no_score(model) -> None:
    scorer = RoundTrip(RoundTripSettings(model, max_length=80), torch.device("cpu"), induce.logps_of)
    texts = {"a": ("Say it", "word " * 200), "b": ("Say it " * 200, "word"), "c": ("Say it", "word")}
    items = [((id, 0), Example("", asked, rejected=said)) for id, (asked, said) in texts.items()]
    scores = dict(scorer.score(items))
    assert scores["a", 0] is None
    assert scores["b", 0] is None
    assert scores["c", 0] is not None


class Numbered:
    """Writes a different instruction for each candidate; the third of row 1 is cut off, its others are empty."""

    def generate(self, requests):
        for request in reversed(list(requests)):
            id, _, number = request.id.partition("/")
            text = "" if id == "1" and number != "2" else f"Ask {id} way {number or 0}"
            yield Generation(request.id, text, truncated=id == "1" and number == "2", prompt_tokens=5, new_tokens=2)


class LikesTheLast:
    name, fingerprint = "forward", "f"

    def __init__(self) -> None:
        self.asked = []

    def score(self, items):
        for key, pair in items:
            self.asked.append(key)
            yield key, Score(float(pair.instruction.split()[-1]), 10)


def test_the_best_of_several_candidates_is_kept(tmp_path) -> None:
    examples = [Example(str(i), rejected=f"text {i}", provenance={"source": f"c:{i}"}) for i in range(3)]
    scorer = LikesTheLast()
    with Ledger(tmp_path / "i.jsonl", {}) as ledger:
        run_stage(examples, ledger, stage_induce(Numbered(), 3), batch_size=2)
    induced = read_ledger(tmp_path / "i.jsonl")[1]
    assert [one["instruction"] for one in induced["0"]["candidates"]] == ["Ask 0 way 0", "Ask 0 way 1", "Ask 0 way 2"]
    assert induced["0"]["tokens"] == 21
    with Ledger(tmp_path / "s.jsonl", {}) as ledger:
        run_stage(with_instructions(examples, induced), ledger, stage_score(scorer), batch_size=3)
    scores = read_ledger(tmp_path / "s.jsonl")[1]
    assert scores["0"] == {"id": "0", "best": 2, "scores": [0.0, 1.0, 2.0], "tokens": 30}
    assert scores["1"] == {"id": "1", "best": 0, "scores": [None, None, None], "tokens": 0}
    assert len(scorer.asked) == 6, "what a cheap check drops is not scored"
    pairs = with_instructions(examples, induced, scores)
    assert [pair.instruction for pair in pairs] == ["Ask 0 way 2", "", "Ask 2 way 2"]
    assert pairs[0].provenance["candidate_scores"] == [0.0, 1.0, 2.0]


def test_one_candidate_is_seeded_as_without_candidates() -> None:
    assert [candidate_id("row", number) for number in range(3)] == ["row", "row/1", "row/2"]
    pair = Example("x", instruction="a", provenance={"truncated": False})
    assert candidates(pair) == [pair]


def test_the_expert_is_asked_about_what_scores_well() -> None:
    asked = []

    class Keeps:
        def screen(self, pairs):
            for pair in pairs:
                asked.append(pair.id)
                yield pair.id, Verdict(True, "keep")

    def pair(id: str, score: float | None) -> Example:
        found = {"truncated": False, "round_trip": score}
        return Example(id, instruction="do it", rejected="done", provenance=found)

    pairs = [pair("good", 0.5), pair("bad", 0.49), pair("none", None)]
    records = {record["id"]: record for record in stage_filter(Keeps(), min_score=0.5)(pairs)}
    assert {id: record["reason"] for id, record in records.items()} == {
        "good": "keep", "bad": "low_round_trip", "none": "no_round_trip",
    }  # fmt: skip
    assert asked == ["good"]
    assert low_score(pair("none", None), None) == ""


def test_the_best_fraction() -> None:
    scores = [0.3, 0.1, 0.9, 0.5, 0.7]
    assert least_score(scores, 0.4) == 0.7
    assert least_score(scores, 1.0) == 0.1
    assert math.isinf(least_score(scores, 0.01))
    assert math.isinf(least_score([], 0.5))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["generation.num_candidates=3", "generation.temperature=1"],
            "set its forward model, roundtrip.model.name_or_path",
        ),
        (
            ["generation.num_candidates=3", "roundtrip.model.name_or_path={model}"],
            "with generation.temperature=0 all would be the same",
        ),
        (["generation.num_candidates=0"], "generation.num_candidates=0: must be 1 or more"),
        (["roundtrip.model.name_or_path=./no/such"], "roundtrip.model.name_or_path=./no/such"),
        (["roundtrip.model.name_or_path={model}", "roundtrip.top_fraction=1.5"], "must lie in (0, 1]"),
        (
            ["roundtrip.model.name_or_path={model}", "roundtrip.top_fraction=0.5", "roundtrip.threshold=1"],
            "is another way to set the limit",
        ),
        (["stage=score"], "roundtrip.model.name_or_path is not set"),
        (["roundtrip.threshold=0.1"], "roundtrip.threshold=0.1: it needs scores"),
        (["generation=openai"], "generation.server.model is not set"),
        (["duplicates.threshold=1.2"], "duplicates.threshold=1.2: must lie in (0, 1]"),
        (["duplicates.index=tape"], "Choices: memory, disk"),
    ],
)
def test_settings_that_cannot_work(overrides, message, tiny_model_folder) -> None:
    base = ["output=out", "corpus.path=README.md", "expert=rules", "model=tiny"]
    config = compose_config("induce", [*base, *(text.format(model=tiny_model_folder) for text in overrides)])
    assert message in "\n".join(map(str, check_induce(config)))


def test_a_fraction_needs_the_scores_of_all_shards(tmp_path) -> None:
    config = compose_config("induce", ["output=out", "corpus.path=README.md", "roundtrip.top_fraction=0.5"])
    paths = {"score": tmp_path / "score-00000-of-00002.jsonl"}
    with Ledger(paths["score"], {"a": 1}, num_rows=2) as ledger:
        for i in range(2):
            ledger.append({"id": f"a{i}", "best": 0, "scores": [float(i)], "tokens": 1})
    with pytest.raises(UserError, match="1 of 2 shards have no ledger of stage=score"):
        induce.resolve_min_score(config.roundtrip, paths, 2)
    with Ledger(tmp_path / "score-00001-of-00002.jsonl", {"a": 1}, num_rows=2) as ledger:
        ledger.append({"id": "b0", "best": 0, "scores": [5.0], "tokens": 1})
        with pytest.raises(UserError, match="but 1 have no score yet"):
            induce.resolve_min_score(config.roundtrip, paths, 2)
        ledger.append({"id": "b1", "best": 1, "scores": [None, 6.0], "tokens": 1})
    assert induce.resolve_min_score(config.roundtrip, paths, 2) == 5.0


def test_candidates_are_counted_in_the_configuration() -> None:
    from safer_instruct.induction.stages import induce_configuration

    one, two = (induce_configuration("m", "f", InductionSettings(num_candidates=n)) for n in (1, 2))
    assert one != two
