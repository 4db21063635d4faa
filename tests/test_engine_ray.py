"""`engine=ray` on a cluster of this machine: a killed worker does not show, a user's mistake ends the command."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from functools import partial

import pytest
from conftest import tiny_llama

import induce
from config.checks_evaluate import check_evaluate
from config.checks_induce import check_induce
from config.errors import UserError
from config.schema import compose_config
from config.settings import EngineSettings
from safer_instruct.engine_ray import run_on_ray
from safer_instruct.induction.spread import waves
from safer_instruct.induction.status import live_line
from tests.evaluations import run_evaluate
from tests.loopback_server import loopback
from tests.ray_stand_in import StandIn, die, fail_at_one

KEEP = json.dumps({"well_formed": True, "unsafe": True, "response_fits": True, "category": "theft"})
KILLED_AT = 12  # requests to the expert


@pytest.fixture(params=["stand-in", "ray"])
def workers(request, monkeypatch):
    """What lists the processes that are at a shard, on two workers of a cluster that knows the expert's key."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TEST_KEY", "sk-nothing")
    if request.param == "stand-in":
        ray = StandIn()
        monkeypatch.setitem(sys.modules, "ray", ray)
        yield ray.workers
        return
    ray = pytest.importorskip("ray", reason="pip install 'safer-instruct[ray]'")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # a token would be written into the home
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15: beside other tests its workers would starve
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield workers_of_ray
    ray.shutdown()


def workers_of_ray() -> list[int]:
    """The processes below this one that Ray has named after the function they are in."""
    psutil = pytest.importorskip("psutil")
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found += [process.pid] if "_in_place" in "".join(process.cmdline()) else []
        except psutil.NoSuchProcess:
            continue
    return found


def command(tmp_path, model: str, url: str, name: str, *more: str) -> list[str]:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"response": f"some text {i}"}) + "\n" for i in range(24)))
    return [
        f"corpus.path={corpus}", "model=tiny", f"model.name_or_path={model}", "expert=openai", "expert.model=m",
        f"expert.base_url={url}", "expert.api_key_env=TEST_KEY", f"output={tmp_path / name}", "device=cpu",
        "generation.max_new_tokens=24", "generation.temperature=1.0", *more,
    ]  # fmt: skip


def test_two_workers_of_which_one_is_killed_make_what_one_process_makes(workers, tmp_path, tokenizer, capsys) -> None:
    model = tiny_llama(len(tokenizer))
    model.generation_config.exponential_decay_length_penalty = (8, 3.0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    killed: list[int] = []
    one_at_a_time = threading.Lock()

    def answer(prompt: str, number: int) -> str:
        with one_at_a_time:  # the server answers in threads
            if is_spread and number >= KILLED_AT and not killed:
                killed.extend(workers()[:1])
                os.kill(killed[0], signal.SIGKILL)
        return "I will not." if "The reply:" in prompt else KEEP

    with loopback(answer) as server:
        is_spread = True
        words = ["engine=ray", "shard.count=2"]
        induce.main(compose_config("induce", command(tmp_path, str(tmp_path / "model"), server.url, "ray", *words)))
        is_spread = False
        shown = capsys.readouterr()
        assert len(killed) == 1
        assert "2 of 2 shards ended; filter " in shown.err
        induce.main(compose_config("induce", command(tmp_path, str(tmp_path / "model"), server.url, "one")))
        one, spread = (tmp_path / name / "si.jsonl" for name in ("one", "ray"))
        assert len(one.read_text().splitlines()) > 15
        assert spread.read_bytes() == one.read_bytes()
        asked = len(server.requests)
        array = ["shard.count=2", "shard.index=0", "stage=filter"]  # an array's task finds nothing to do
        induce.main(compose_config("induce", command(tmp_path, str(tmp_path / "model"), server.url, "ray", *array)))
        assert len(server.requests) == asked + 1  # the test request


def test_what_the_user_has_to_mend_is_told_when_the_other_shards_are_done(workers, tmp_path) -> None:
    with pytest.raises(UserError, match="1 of 3 shards failed, the first: no such row"):
        run_on_ray(partial(fail_at_one, tmp_path), 3, EngineSettings(name="ray", cpus=0.5), lambda: "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2"]


@pytest.mark.parametrize("workers", ["stand-in"], indirect=True)
def test_a_shard_that_kills_every_worker_is_given_up(workers, monkeypatch) -> None:
    monkeypatch.setattr("safer_instruct.engine_ray.DEATHS", 2)
    with pytest.raises(UserError, match=r"1 of 1 shards failed, the first: its workers died 3 times"):
        run_on_ray(die, 1, EngineSettings(name="ray"), lambda: "")


@pytest.mark.parametrize("workers", ["stand-in"], indirect=True)
def test_an_evaluation_by_workers_says_what_one_process_says(workers, tmp_path, tiny_model_folder) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"instruction": f"What is {i}?"}) + "\n" for i in range(6)))
    command = [
        f"models.tiny.path={tiny_model_folder}", f"prompts.a.path={prompts}", "prompts.a.kind=benign", "expert=rules",
        "generation.max_new_tokens=4", "device=cpu",
    ]  # fmt: skip
    run_evaluate(*command, f"output={tmp_path / 'one'}")
    run_evaluate(*command, f"output={tmp_path / 'ray'}", "engine=ray", "shard.count=2")
    assert len(list((tmp_path / "ray" / "ledger").glob("generate-tiny-*-of-00002.jsonl"))) == 2
    one, spread = ((tmp_path / name / "samples.jsonl").read_bytes() for name in ("one", "ray"))
    assert spread == one


def test_without_ray(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install 'safer-instruct\\[ray\\]'"):
        run_on_ray(lambda index: None, 1, EngineSettings(name="ray"), lambda: "")


def test_no_shard_begins_what_hangs_on_all_of_them() -> None:
    command = ["output=x", "engine=ray"]
    assert waves(compose_config("induce", command)) == ["all"]
    assert waves(compose_config("induce", [*command, "stage=filter"])) == ["filter"]
    assert waves(compose_config("induce", [*command, "respond.max_same=0.1"])) == ["all", "vary"]
    ranked = waves(compose_config("induce", [*command, "roundtrip.top_fraction=0.5"]))
    assert ranked == ["induce", "score", "filter", "respond"]


def test_the_live_line(tmp_path) -> None:
    assert live_line(tmp_path) == "no row yet"
    now = time.time()
    lines = [{"format": 1, "configuration": {}, "rows": 9}]
    lines += [{"id": str(i), "cost": 0.25, "at": round(now - 10 + i, 1)} for i in range(6)]
    for shard in range(2):
        (tmp_path / f"filter-{shard:05d}-of-00002.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert live_line(tmp_path) == "filter 12 rows, 2.4 rows/s, cost 3.00"


@pytest.mark.parametrize(
    ("check", "name", "words", "message"),
    [
        (check_induce, "induce", [], "engine=ray: how many shards?"),
        (check_induce, "induce", ["shard.count=2", "shard.index=1"], "shard.index=1: engine=ray does all shards"),
        (
            check_induce,
            "induce",
            ["shard.count=2", "stage=merge"],
            "engine=ray: only commands that ask models about rows have it",
        ),
        (check_evaluate, "evaluate", [], "engine=ray: how many shards?"),
        (check_evaluate, "evaluate", ["shard.count=2", "compare=[x]"], "leave it out with compare="),
    ],
)
def test_what_the_engine_does_not_take(check, name, words, message) -> None:
    faults = check(compose_config(name, ["output=x", "engine=ray", *words]))
    assert [fault for fault in faults if message in str(fault)], faults
