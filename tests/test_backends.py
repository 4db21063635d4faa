"""The reversed model in vLLM (a stand-in of its public API) and behind servers, with the prompts of the HF backend."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama

from config.errors import UserError
from config.settings import BackendSettings, InductionSettings, LocalExpertSettings, ModelSettings, ServerSettings
from safer_instruct.experts.expert import build_expert
from safer_instruct.experts.prompts import SCREEN
from safer_instruct.generation.backends import build_reversed_model, reversed_model_identity
from safer_instruct.generation.completions import Request
from safer_instruct.text.examples import Example
from safer_instruct.text.prompts import Prompt, render_reversed
from tests.loopback_server import loopback

CPU = torch.device("cpu")
TEXTS = {f"r{i}": f"The sum is {i}. " * (1 + i % 4) for i in range(7)}


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in: it keeps what it was given, and cuts its answer behind an even number of prompt tokens."""
    seen = types.SimpleNamespace(engine=None, prompts=[], parameters=[], room=256, answer=[7, 8])

    class LLM:
        def __init__(self, **options):
            seen.engine = options
            config = types.SimpleNamespace(max_model_len=options["max_model_len"] or seen.room)
            self.llm_engine = types.SimpleNamespace(model_config=config)

        def generate(self, prompts, parameters, use_tqdm=True):
            seen.prompts, seen.parameters = prompts, parameters
            outputs = []
            for prompt, one in zip(prompts, parameters, strict=True):
                cut = len(prompt["prompt_token_ids"]) % 2 == 0
                tokens = [7] * one.max_tokens if cut else [*seen.answer, 2]
                answer = types.SimpleNamespace(token_ids=tokens, finish_reason="length" if cut else "stop")
                outputs.append(types.SimpleNamespace(outputs=[answer]))
            return outputs

    module = types.ModuleType("vllm")
    module.LLM = LLM
    module.SamplingParams = lambda **options: types.SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return seen


def requests() -> list[Request]:
    return [Request(id, render_reversed(text)) for id, text in TEXTS.items()]


def test_vllm_is_given_our_tokens_and_a_seed_for_each_row(vllm, tiny_model_folder, tokenizer) -> None:
    settings = InductionSettings(max_new_tokens=20, temperature=0.7, top_p=0.9, seed=3, backend="vllm")
    settings.vllm.tensor_parallel = 4
    model = ModelSettings(name_or_path=tiny_model_folder, policy_dtype="bfloat16")
    generator = build_reversed_model(model, settings, CPU)
    results = {one.id: one for one in generator.generate(requests())}
    assert vllm.engine["tensor_parallel_size"] == 4
    assert vllm.engine["dtype"] == "bfloat16"
    assert vllm.engine["model"] == tiny_model_folder
    expected = [tokenizer(render_reversed(text).text)["input_ids"] for text in TEXTS.values()]
    assert [prompt["prompt_token_ids"] for prompt in vllm.prompts] == expected
    assert {(one.max_tokens, one.temperature, one.top_p) for one in vllm.parameters} == {(20, 0.7, 0.9)}
    seeds = [one.seed for one in vllm.parameters]
    assert len(set(seeds)) == 7
    for id, ids in zip(TEXTS, expected, strict=True):
        assert results[id].text == tokenizer.decode([7] * 20 if len(ids) % 2 == 0 else [7, 8])
        assert results[id].truncated == (len(ids) % 2 == 0)
        assert results[id].prompt_tokens == len(ids)
    list(generator.generate(requests()[3:]))
    assert [one.seed for one in vllm.parameters] == seeds[3:], "a row's seed is a function of (seed, id) alone"


def test_a_thought_between_special_tokens_is_no_answer_of_vllm(vllm, tiny_model_folder, tokenizer) -> None:
    """BOS and PAD stand for tags that a family has as special tokens, which decoding leaves out."""
    opening, closing = tokenizer.convert_ids_to_tokens([1, 0])
    settings = InductionSettings(max_new_tokens=20, backend="vllm", thought_tags=[f"{opening} {closing}"])
    vllm.answer = [1, 40, 41, 0, 50, 51]
    generator = build_reversed_model(ModelSettings(name_or_path=tiny_model_folder), settings, CPU)
    prompts = [Request(str(n), Prompt("", "xyz"[:n], "")) for n in (1, 2)]
    ended = [one for one in generator.generate(prompts) if not one.truncated]
    assert {(one.text, one.thought) for one in ended} == {
        (tokenizer.decode([50, 51]), f"{opening}{tokenizer.decode([40, 41])}{closing}")
    }


def test_vllm_cuts_and_refuses_prompts_as_the_hf_backend_does(vllm, tiny_model_folder) -> None:
    settings = InductionSettings(max_new_tokens=20, backend="vllm")
    settings.vllm.max_length = 120
    generator = build_reversed_model(ModelSettings(name_or_path=tiny_model_folder), settings, CPU)
    long = Request("long", render_reversed("word " * 300))
    none = Request("none", Prompt("head " * 300, "body", "tail"))
    results = {one.id: one for one in generator.generate([long, *requests()[:1], none])}
    assert results["none"].error == "prompt_too_long"
    assert results["long"].prompt_cut
    assert results["long"].prompt_tokens <= 100
    assert not results["r0"].prompt_cut


def test_a_local_expert_takes_every_backend(vllm, tiny_model_folder, monkeypatch) -> None:
    """The same rubric, asked in one turn, reaches vLLM as tokens and a server of one's own as text."""
    monkeypatch.setenv("TEST_KEY", "any")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model = ModelSettings(name_or_path=tiny_model_folder)
    pair = Example("a", instruction="ask {x}", rejected="text")
    verdict = {"well_formed": True, "unsafe": True, "response_fits": True, "category": ""}
    choice = {"text": f"<think> hm </think> {json.dumps(verdict)}", "finish_reason": "stop"}
    served = build_expert(LocalExpertSettings("local", model, "plain", BackendSettings(backend="vllm")), CPU)
    assert vllm.engine is None, "nothing is loaded before the first row"
    vllm.room = 4096
    ((_, unread),) = served.screen([pair])
    assert unread.reason.startswith("abstain_")
    assert len(vllm.prompts) == 1
    with loopback(lambda *_: (200, {"choices": [choice]})) as server:
        own = ServerSettings(model="m", base_url=server.url, api_key_env="TEST_KEY")
        settings = BackendSettings(backend="openai", server=own)
        expert = build_expert(LocalExpertSettings("local", model, "plain", settings), CPU)
        expert.check()
        ((_, read),) = expert.screen([pair])
    assert read.keep
    assert server.requests[-1][1]["prompt"] == SCREEN.render("ask {x}", "text").text + "\n"
    assert served.fingerprint("screen") != expert.fingerprint("screen")


def test_vllm_that_is_not_installed_says_what_to_type(monkeypatch, tiny_model_folder) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    settings = InductionSettings(backend="vllm")
    with pytest.raises(UserError, match=r"pip install vllm"):
        build_reversed_model(ModelSettings(name_or_path=tiny_model_folder), settings, CPU)


def test_vllm_reads_no_policy_pt(vllm, tmp_path, tiny_model_folder) -> None:
    torch.save({"state": {}}, tmp_path / "policy.pt")
    model = ModelSettings(name_or_path=tiny_model_folder, archive=str(tmp_path / "policy.pt"))
    with pytest.raises(UserError, match=r"vLLM reads model folders, not policy\.pt"):
        build_reversed_model(model, InductionSettings(backend="vllm"), CPU)


def test_a_server_is_known_by_its_model_and_decoding(tiny_model_folder) -> None:
    def identity(**options) -> tuple[str, str]:
        server = ServerSettings(model="reversed", base_url=options.pop("url", "http://a/v1"))
        return reversed_model_identity(ModelSettings(), InductionSettings(backend="openai", server=server, **options))

    assert identity() == identity(url="http://b/v1")
    assert identity()[0] == "openai:reversed"
    assert len({identity()[1], identity(temperature=1.0)[1], identity(seed=5)[1], identity(max_new_tokens=9)[1]}) == 4


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer):
    """`transformers serve` with the tiny model: a server that is not ours. (address, model id)"""
    pytest.importorskip("fastapi", reason="transformers serve needs transformers[serving]")
    pytest.importorskip("uvicorn", reason="transformers serve needs transformers[serving]")
    folder = tmp_path_factory.mktemp("served")
    model = tiny_llama(len(tokenizer))
    model.config.max_position_embeddings = 2048
    model.generation_config.exponential_decay_length_penalty = (4, 3.0)  # texts end by themselves
    model.save_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = None
    process, address = start_server(folder)
    try:
        yield f"{address}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(timeout=600)


def start_server(folder: Path) -> tuple[subprocess.Popen, str]:
    """Start `transformers serve` on a port that is free; another program may take it first: then on another one."""
    program = str(Path(sys.executable).with_name("transformers"))
    for _ in range(5):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [program, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                return process, f"http://127.0.0.1:{port}"
            except OSError:
                time.sleep(0.3)
        if "address already in use" not in (folder / "log").read_text():
            break
    pytest.fail((folder / "log").read_text()[-2000:])


@pytest.mark.slow
def test_a_real_server_that_is_not_ours(served, tmp_path, tiny_model_folder, monkeypatch) -> None:
    """All of induce.py against it: reversed model and expert. A random model's verdicts cannot be read: abstentions."""
    import induce
    from config.checks_induce import check_induce
    from config.schema import compose_config

    url, name = served
    monkeypatch.setenv("TEST_KEY", "none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"response": f"apple banana {i}", "label": "x"}) + "\n" for i in range(6)))
    server = [f"base_url={url}", f"model={name}", "api_key_env=TEST_KEY", "concurrency=3"]
    overrides = [
        f"corpus.path={corpus}", f"output={tmp_path / 'out'}", "generation=openai", "generation.max_new_tokens=24",
        *(f"generation.server.{part}" for part in server), "expert=openai", "expert.max_new_tokens=24",
        *(f"expert.{part}" for part in server),
    ]  # fmt: skip
    config = compose_config("induce", overrides)
    assert check_induce(config) == []
    induce.main(config)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["funnel"][0]["in"] == 6
    drops = report["funnel"][2]["drops"]
    assert sum(drops.values()) + report["funnel"][2]["out"] == 6
    assert set(drops) <= {"abstain_unreadable", "abstain_truncated", "truncated_instruction", "empty_instruction"}
    assert report["tokens"]["induce"] > 6 * 8
    assert report["tokens"]["filter"] > 6 * 100, "each pair and its repair have been asked about"
