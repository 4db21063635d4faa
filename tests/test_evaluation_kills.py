"""A killed evaluation goes on without losing a row or judging one twice; the long version is the benchmark."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import evaluation_kills
from benchmarks.evaluation_kills import (
    CONCURRENCY,
    command,
    contents,
    judge,
    ledger_lines,
    measure,
    write_answers,
)
from tests import warm
from tests.evaluations import run_evaluate
from tests.loopback_server import loopback


@pytest.mark.slow
def test_killed_and_typed_again(tmp_path, monkeypatch):
    started = SimpleNamespace(Popen=warm.Popen, run=warm.run, DEVNULL=None)
    monkeypatch.setattr(evaluation_kills, "subprocess", started)
    outcome = measure(tmp_path, num_prompts=40, num_models=3, kills=1, delay_seconds=0.15)
    assert (outcome.rows, outcome.lost, outcome.twice, outcome.same_report) == (120, 0, 0, True)
    assert outcome.asked_again <= CONCURRENCY


def test_shards_judge_each_row_once_and_their_report_is_that_of_one_process(tmp_path, monkeypatch):
    answers = tmp_path / "answers.csv"
    write_answers(answers, 30, 2)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with loopback(judge) as server:

        def run(output, *more):
            arguments = command(answers, tmp_path / output, server.url)[2:]
            run_evaluate(*arguments, *more)

        for index in range(2):
            run("sharded", f"shard.index={index}", "shard.count=2")
            assert not (tmp_path / "sharded" / "report.json").exists()
        before = len(server.requests)
        parts = sorted(path.name[-20:] for path in (tmp_path / "sharded" / "ledger").glob("judge-*"))
        assert parts == ["00000-of-00002.jsonl", "00001-of-00002.jsonl"]
        ids = [json.loads(line)["id"] for line in ledger_lines(tmp_path / "sharded")]
        assert len(ids) == len(set(ids)) == 60
        run("sharded")
        assert len(server.requests) == before + 1  # the probe: every row was in a shard's ledger
        run("whole")
    assert contents(tmp_path / "sharded") == contents(tmp_path / "whole")
