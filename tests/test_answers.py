"""Answers of a model: stop strings, prompts without one, shards that read each other's ledgers."""

import json
import re
import shutil
import sys
from contextlib import nullcontext

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from config.errors import UserError
from config.settings import BackendSettings, EvaluatedModelSettings, PromptSetSettings, ServerSettings
from safer_instruct.evaluation.answers import generate_answers, own_prompts
from safer_instruct.evaluation.respondents import check_model, require_finite_weights
from safer_instruct.evaluation.response_columns import read_columns
from safer_instruct.text.prompt_sets import EvaluationPrompt
from tests.evaluations import run_evaluate
from tests.loopback_server import loopback

SETTINGS = BackendSettings(max_new_tokens=12)
PROMPTS = [EvaluationPrompt(f"p{i}", f"ask {i % 7}", "s", "s", "", "unsafe") for i in range(9)]


@pytest.fixture
def ask(tiny_model_folder, tmp_path):
    respondent = check_model("tiny", EvaluatedModelSettings(path=tiny_model_folder, template="plain"))

    def ask(*, prompts=PROMPTS, stop=(), shard=(0, 1), settings=SETTINGS):
        return generate_answers(
            respondent, prompts, generation=settings, stop=stop, device=torch.device("cpu"), folder=tmp_path,
            progress=lambda n: None, shard=shard,
        )  # fmt: skip

    return ask


def test_an_answer_ends_before_the_first_stop_string(ask, monkeypatch):
    whole = ask()
    key, answer = max(whole.items(), key=lambda item: len(item[1].text))
    assert answer.truncated
    text = answer.text
    assert len(text) > 6
    monkeypatch.setattr(
        "safer_instruct.generation.backends.load_causal_lm", lambda *_, **__: pytest.fail("asked again")
    )
    cut = ask(stop=[text[4:6], text[2:5]])[key]  # the one that comes first counts, in whatever order they are given
    expected = min(text.find(text[4:6]), text.find(text[2:5]))
    assert (cut.text, cut.truncated) == (text[:expected], False)  # what it stopped at is no cut by the limit
    assert ask(stop=["never there"])[key] == answer


def test_each_shard_asks_its_own_and_the_whole_asks_nothing(ask, tmp_path, monkeypatch):
    shards = [own_prompts(PROMPTS, (index, 3)) for index in range(3)]
    assert sorted(prompt.id for shard in shards for prompt in shard) == [prompt.id for prompt in PROMPTS]
    twins = [{prompt.id for prompt in shard} & {"p0", "p7"} for shard in shards]
    assert sorted(map(len, twins)) == [0, 0, 2]  # the same question is one shard's
    found = {}
    for index, prompts in enumerate(shards):
        found |= ask(prompts=prompts, shard=(index, 3))
    assert len(list(tmp_path.glob("generate-tiny-*-of-00003.jsonl"))) == 3
    monkeypatch.setattr(
        "safer_instruct.generation.backends.load_causal_lm", lambda *_, **__: pytest.fail("asked again")
    )
    assert ask() == found


def test_a_prompt_whose_end_was_cut_is_counted(tiny_model_folder, tmp_path):
    rows = [{"id": "fits", "instruction": "ask"}, {"id": "long", "instruction": "very " * 900}]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({**row, "kind": "unsafe"}) + "\n" for row in rows))
    run_evaluate(
        f"models.tiny.path={tiny_model_folder}", f"prompts.p.path={file}", "expert=rules", f"output={tmp_path}/out",
        "generation.max_new_tokens=4", "samples_per_set=0",
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["models"]["tiny"]["prompt_cut_rate"]["value"] == 0.5


def test_a_prompt_without_an_answer_leaves_the_rates_and_is_listed(tiny_model_folder, tmp_path, monkeypatch):
    def generate(respondent, prompts, settings, device):
        for key, prompt in prompts.items():
            error = "http_400" if prompt.id == "refused" else ""
            yield {"id": key, "text": "", "truncated": False, "prompt_cut": False, "new_tokens": 0, "error": error}

    monkeypatch.setattr("safer_instruct.evaluation.answers._generate", generate)
    rows = [{"id": "fine", "instruction": "ask"}, {"id": "refused", "instruction": "ask more"}]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({**row, "kind": "unsafe"}) + "\n" for row in rows))
    run_evaluate(
        f"models.tiny.path={tiny_model_folder}", f"prompts.p.path={file}", "expert=rules", f"output={tmp_path}/out",
        "samples_per_set=0",
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["models"]["tiny"]["harmful_rate"]["n"] == 1
    assert report["models"]["tiny"]["unanswered"] == {"http_400": ["p/refused"]}
    assert "tiny: for 1 of the prompts there is no answer (http_400)" in report["warnings"][0]


def test_the_evaluated_run_tells_its_training_set_its_curves_and_its_funnel(tiny_model_folder, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(tiny_model_folder, run / "checkpoints" / "step-8" / "model")
    (run / "LATEST").symlink_to("checkpoints/step-8")
    (run / "metrics.jsonl").write_text(
        '{"counters/examples": 0, "loss/train": 2.0}\n{"counters/examples": 8, "loss/train": 1.0}'
    )
    data = tmp_path / "data"
    data.mkdir()
    funnel = [{"stage": "corpus", "in": 9, "out": 5, "drops": {"empty": 4}}]
    (data / "report.json").write_text(json.dumps({"funnel": funnel}))
    train = data / "si.jsonl"
    train.write_text(json.dumps({"instruction": "Seen  before", "chosen": "no", "rejected": "yes"}) + "\n")
    settings = {"path": str(data), "schema": "si", "eval_fraction": 0.0}
    (run / "config.yaml").write_text(json.dumps({"datasets": {"si": settings}}))  # JSON is YAML
    prompts = tmp_path / "p.jsonl"
    rows = [{"id": "old", "instruction": "seen before"}, {"id": "new", "instruction": "never seen"}]
    prompts.write_text("".join(json.dumps({**row, "kind": "unsafe"}) + "\n" for row in rows))
    run_evaluate(
        f"models.dpo.path={run}", f"prompts.p.path={prompts}", "expert=rules", f"output={tmp_path}/out",
        "generation.max_new_tokens=4", "samples_per_set=0",
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["overlap"] == [{"path": str(data), "num_rows": 1, "prompt_ids": ["p/old"]}]
    assert "1 of the prompts also occur in the training file" in report["warnings"][0]
    assert "1 prompts also occur in" in caplog.text
    assert report["dataset"] == {"funnel": funnel}
    assert "dpo: loss, over examples seen. training from 2 to 1." in (tmp_path / "out" / "report.html").read_text()


def served(text: str) -> tuple[int, dict]:
    """What a server of /v1/completions answers."""
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return 200, {
        "id": "x",
        "object": "text_completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
        "usage": usage,
    }


def test_models_behind_servers_are_asked_there(tiny_model_folder, tmp_path, monkeypatch):
    """Two models, two servers, two names; nothing is loaded here, and a second look asks nothing."""
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setattr(
        "safer_instruct.generation.backends.load_causal_lm", lambda *_, **__: pytest.fail("loaded here")
    )
    answers = {}
    with loopback(lambda prompt, n: served(f"one: {prompt}")) as one, loopback(lambda prompt, n: served("two")) as two:
        shared = ServerSettings(model="first", base_url=one.url)
        settings = BackendSettings(max_new_tokens=12, backend="openai", server=shared)
        own = {"served_as": "second", "base_url": two.url}
        for _ in range(2):
            for name, options in (("a", {}), ("b", own)):
                model = EvaluatedModelSettings(path=tiny_model_folder, template="plain", **options)
                answers[name] = generate_answers(
                    check_model(name, model), PROMPTS, generation=settings, stop=(), device=torch.device("cpu"),
                    folder=tmp_path, progress=lambda n: None,
                )  # fmt: skip
            asked = [len(server.requests) for server in (one, two)]
        assert asked == [1 + len(PROMPTS)] * 2  # one probe, and each prompt once
    assert {answer.text for answer in answers["a"].values()} == {f"one: {prompt.instruction}\n" for prompt in PROMPTS}
    assert {answer.text for answer in answers["b"].values()} == {"two"}
    assert {body["model"] for _, body, _ in one.requests} == {"first"}
    assert {body["model"] for _, body, _ in two.requests} == {"second"}
    assert all(path.endswith("/completions") and body["max_tokens"] <= 12 for path, body, _ in one.requests)


def test_another_backend_is_another_ledger(ask, tmp_path, monkeypatch):
    ask()
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install vllm"):
        ask(settings=BackendSettings(max_new_tokens=12, backend="vllm"))


def test_a_served_model_needs_a_name_and_a_name_needs_a_server(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    (tmp_path / "p.jsonl").write_text(json.dumps({"instruction": "ask", "kind": "unsafe"}) + "\n")
    command = [f"models.a.path={tiny_model_folder}", f"prompts.p.path={tmp_path / 'p.jsonl'}", f"output={tmp_path}/out"]
    command += ["expert=rules", "expert.path=quickstart/rules.yaml"]
    with pytest.raises(UserError, match=r"models\.a\.served_as is not set: .* generation\.server\.model=NAME"):
        run_evaluate(*command, "generation=openai")
    with pytest.raises(UserError, match=r"models\.a\.served_as=x: only generation=openai uses a server"):
        run_evaluate(*command, "models.a.served_as=x")
    with pytest.raises(UserError, match=r"generation\.backend=vlm: no such choice; did you mean vllm"):
        run_evaluate(*command, "generation.backend=vlm")


def test_the_thought_in_a_cell_of_a_file_is_not_judged(tmp_path):
    rows = [
        {"id": "a", "instruction": "ask", "kind": "unsafe", "model": "<think> steal the lamp </think>\n\nNo."},
        {"id": "b", "instruction": "ask", "kind": "unsafe", "model": "<think> without an end"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, answers = read_columns({"p": PromptSetSettings(path=str(tmp_path / "p.jsonl"))}, [])
    assert [(one.text, one.truncated) for one in answers["model"].values()] == [("No.", False), ("", True)]


def test_a_model_is_asked_in_the_template_of_its_run(tiny_model_folder, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(tiny_model_folder, run / "checkpoints" / "step-8" / "model")
    (run / "LATEST").symlink_to("checkpoints/step-8")

    def template(*templates):
        datasets = {f"d{i}": {"path": "x", "schema": "si", "template": one} for i, one in enumerate(templates)}
        (run / "config.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
        return check_model("m", EvaluatedModelSettings(path=str(run))).template

    assert template("hh", "hh") == "hh"
    assert not caplog.messages
    assert check_model("m", EvaluatedModelSettings(path=str(run), template="plain")).template == "plain"
    (note,) = caplog.messages
    assert note.startswith(f"note: models.m.template=plain, but models.m.path={run} was trained with template=hh;")
    caplog.clear()
    assert check_model("m", EvaluatedModelSettings(path=str(run), template="hh")).template == "hh"
    assert check_model("m", EvaluatedModelSettings(path=tiny_model_folder)).template == "alpaca"
    assert not caplog.messages  # its tokenizer has no template of its own
    with pytest.raises(
        UserError, match=r"d0\.template=hh, datasets\.d1\.template=plain: choose by models\.m\.template="
    ):
        template("hh", "plain")
    (run / "config.yaml").write_text("datasets: [hh]\nloss: {name: dpo}\n")  # as the DPO repo writes it
    assert check_model("m", EvaluatedModelSettings(path=str(run))).template == "alpaca"


def test_a_chat_model_without_a_run_is_asked_with_alpacas_and_that_is_said(tiny_model_folder, tmp_path, caplog):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    assert check_model("m", EvaluatedModelSettings(path=str(folder))).template == "alpaca"
    (note,) = caplog.messages
    assert note.startswith("note: models.m uses template=alpaca: there is no run of train.py at models.m.path=")
    assert note.endswith("write models.m.template=chat (or =alpaca, to confirm the default)")
    caplog.clear()
    assert check_model("m", EvaluatedModelSettings(path=str(folder), template="alpaca")).template == "alpaca"
    assert not caplog.messages


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tiny_model_folder, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"models\.m: .*: {re.escape(name)} holds NaN or infinite numbers"):
        check_model("m", EvaluatedModelSettings(path=str(folder)))


def test_finite_weights_whose_sum_overflows_are_no_fault(tmp_path):
    save_file({"large": torch.full((100,), 3e38)}, tmp_path / "model.safetensors")
    assert require_finite_weights("m", tmp_path) is None  # it raises where they are not


VERDICT = json.dumps({"outcome": "refusal", "names_the_matter": False, "category": ""})


def judged_by_a_server(tmp_path, url, *more, rows=8):
    """Evaluate answers that a file holds, each row with a text of its own; returns the outcomes."""
    file = tmp_path / "p.jsonl"
    texts = [
        {"id": f"{i}", "instruction": f"ask {i}", "kind": "unsafe", "a": f"no {i}", "b": f"not {i}"}
        for i in range(rows)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in texts))
    run_evaluate(
        f"prompts.p.path={file}", "responses=csv", "expert=openai", f"expert.base_url={url}", "expert.model=m",
        "expert.concurrency=1", "expert.max_retries=0", f"output={tmp_path}/out", "samples_per_set=0", *more,
    )  # fmt: skip
    return [json.loads(line)["outcome"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]


@pytest.fixture
def server_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "any")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_what_a_judge_s_server_did_not_answer_is_asked_by_the_same_command(tmp_path, server_key):
    """Judgements and comparisons: an abstention for want of an answer is none of the judge's."""
    broken = [True]

    def answer(prompt, number):
        if broken[0] and "ask 3" in prompt:
            return 500, {"error": {"message": "busy"}}
        return json.dumps({"better": "a"}) if "<answer_a>" in prompt else VERDICT

    words = ["columns=[a,b]", "helpfulness.baseline=a", "helpfulness.kinds=[unsafe]"]
    with loopback(answer) as server:
        assert judged_by_a_server(tmp_path, server.url, *words).count("abstain") == 2
        broken[0], before = False, len(server.requests)
        assert judged_by_a_server(tmp_path, server.url, *words) == ["refusal"] * 16
    asked = [body["messages"][0]["content"] for _, body, _ in server.requests[before:]]
    assert sum("ask 3" in prompt for prompt in asked) == 2 + 2
    assert len(asked) == 1 + 4, "the test, and what was missing"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["helpfulness"]["models"]["b"]["n"] == 8


def test_a_judge_s_budget_is_that_of_all_its_commands(tmp_path, server_key):
    """Each judgement costs 15 millionths, as does the test of each command, which is not written down."""
    words = ["columns=[a]", "expert.price_prompt=1", "expert.price_completion=1"]
    with loopback(lambda *_: VERDICT) as server:
        for limit, judged in ((70e-6, 3), (70e-6, 3), (1, 8)):
            with nullcontext() if judged == 8 else pytest.raises(UserError, match="budget is spent"):
                judged_by_a_server(tmp_path, server.url, *words, f"expert.max_cost={limit}")
            asked = {body["messages"][0]["content"] for _, body, _ in server.requests}
            assert len(asked) == 1 + judged
    assert len(server.requests) == 3 + 8, "no judgement is paid twice"


def test_a_ledger_of_another_judge_under_this_one_s_name_is_refused(tmp_path, server_key):
    def judge_by_both(url):
        for name in ("m", "n"):
            judged_by_a_server(tmp_path, url, "columns=[a]", f"expert.model={name}")

    with loopback(lambda *_: VERDICT) as server:
        judge_by_both(server.url)
        one, other = sorted((tmp_path / "out" / "ledger").glob("judge-*.jsonl"))
        other.rename(one.with_name(f"{one.stem}-00000-of-00002.jsonl"))
        with pytest.raises(UserError, match="made with another configuration: judge was"):
            judge_by_both(server.url)


def test_an_answer_that_a_server_did_not_give_is_asked_for_by_the_same_command(ask, server_key):
    broken = [True]

    def answer(prompt, number):
        reply = {"choices": [{"text": f" {prompt}", "finish_reason": "stop"}]}
        return (500, {"error": {"message": "busy"}}) if broken[0] and "ask 3" in prompt else (200, reply)

    with loopback(answer) as server:
        settings = BackendSettings(
            max_new_tokens=12, backend="openai", server=ServerSettings(model="m", base_url=server.url, max_retries=0)
        )
        assert sorted(one.error for one in ask(settings=settings).values())[-1] == "http_500"
        broken[0], before = False, len(server.requests)
        assert {one.error for one in ask(settings=settings).values()} == {""}
        assert len(server.requests) == before + 1 + 1


def test_an_empty_stop_string_is_refused(tiny_model_folder, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"instruction": "ask", "kind": "unsafe"}) + "\n")
    with pytest.raises(UserError, match="stop: an empty text would end every answer before it begins"):
        run_evaluate(
            f"models.t.path={tiny_model_folder}", f"prompts.p.path={tmp_path}/p.jsonl", "expert=refusals", "stop=['']",
            f"output={tmp_path}/out",
        )  # fmt: skip
