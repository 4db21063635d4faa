"""induce.py as a user runs it: all stages, shards, a kill in the middle, other formats of the corpus."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import tiny_llama

import induce
from config.errors import UserError
from config.schema import compose_config
from config.settings import ShardSettings
from safer_instruct.induction.ledger import read_ledger
from safer_instruct.shards import resolve_shard
from tests import warm
from tests.loopback_server import loopback

REPOSITORY = Path(__file__).resolve().parents[1]
SECRET = "zebra"
KEEP = json.dumps({"well_formed": True, "unsafe": True, "response_fits": True, "category": "theft"})
ROWS = [{"response": f"{SECRET} number {i} " + "and more " * (i % 7), "label": "ab"[i % 2]} for i in range(40)]


@pytest.fixture(scope="module")
def ending_model(tmp_path_factory, tokenizer) -> str:
    """The tiny model with a growing wish to end: its instructions have 8 to 20 tokens."""
    folder = tmp_path_factory.mktemp("ending")
    model = tiny_llama(len(tokenizer))
    model.generation_config.exponential_decay_length_penalty = (8, 3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-nothing")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def answer(prompt: str, _: int) -> str:
        return "I will not." if "The reply:" in prompt else KEEP

    with loopback(answer) as server:
        yield server


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def arguments(corpus: Path, model: str, url: str, output: Path, *more: str) -> list[str]:
    return [
        f"corpus.path={corpus}", "model=tiny", f"model.name_or_path={model}", "expert=openai", "expert.model=m",
        f"expert.base_url={url}", "expert.api_key_env=TEST_KEY", f"output={output}", "generation.max_new_tokens=40",
        "generation.temperature=1.0", "device=cpu", *more,
    ]  # fmt: skip


def run(*overrides: str) -> None:
    induce.main(compose_config("induce", list(overrides)))


def test_stages_and_shards_one_by_one_make_the_same_dataset(corpus, ending_model, server, tmp_path, capsys) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    run(*arguments(corpus, ending_model, server.url, one))
    text = (one / "si.jsonl").read_text()
    pairs = [json.loads(line) for line in text.splitlines()]
    assert len(pairs) > 30, "the fixture must let most rows through"
    assert {pair["chosen"] for pair in pairs} == {"I will not."}
    for index in (2, 0, 1):
        shard = [f"shard.index={index}", "shard.count=3"]
        for stage in ("induce", "filter", "respond"):
            run(*arguments(corpus, ending_model, server.url, three, f"stage={stage}", *shard))
    run(f"corpus.path={corpus}", f"output={three}", "stage=merge")
    assert (three / "si.jsonl").read_text() == text
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err
    assert "stage=merge" in shown.out
    asked = len(server.requests)
    run(*arguments(corpus, ending_model, server.url, one))
    assert len(server.requests) == asked + 1, "a finished run asks the expert nothing but the test request"
    run(*arguments(corpus, ending_model, server.url, one, "log_text=true"))
    assert SECRET in capsys.readouterr().out


def test_kill_9_and_the_same_command_again(corpus, ending_model, server, tmp_path) -> None:
    straight = tmp_path / "straight"
    run(*arguments(corpus, ending_model, server.url, straight))
    num_paid = len(server.requests) - 1
    server.requests.clear()
    killed = tmp_path / "killed"
    command = [sys.executable, str(REPOSITORY / "induce.py"), *arguments(corpus, ending_model, server.url, killed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = warm.Popen(command, env=environment)
    while process.poll() is None and len(server.requests) < num_paid // 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    done = read_ledger(killed / "ledger" / "filter-00000-of-00001.jsonl")[1]
    assert 0 < len(done) < 40
    finished = warm.run(command, env=environment, check=True)
    assert (killed / "si.jsonl").read_bytes() == (straight / "si.jsonl").read_bytes()
    assert SECRET not in finished.stdout + finished.stderr
    assert "| filter | 40 |" in finished.stdout
    in_flight = 8  # expert.concurrency
    assert len(server.requests) <= num_paid + 2 + in_flight


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["response", "label"])
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "datasets"])
def test_corpora_of_any_format(kind, tmp_path, ending_model, server) -> None:
    path = tmp_path / f"corpus.{kind}"
    write = {
        "csv": write_csv,
        "json": lambda path: path.write_text(json.dumps(ROWS)),
        "parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
        "datasets": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
    }
    write[kind](path)
    run(*arguments(path, ending_model, server.url, tmp_path / "out", "format=parquet", "corpus.max_rows=10"))
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "si.parquet").to_pylist()
    rejected = [row["rejected"] for row in rows]
    assert 5 < len(rows) <= 10
    assert rejected == [row["response"] for row in ROWS if row["response"] in rejected]


@pytest.mark.parametrize(
    ("given", "slurm", "expected"),
    [
        ((None, None), {}, (0, 1)),
        ((2, 5), {}, (2, 5)),
        ((None, None), {"ID": "3", "COUNT": "4", "MIN": "0"}, (3, 4)),
        ((None, None), {"ID": "4", "COUNT": "4", "MIN": "1"}, (3, 4)),
        ((None, None), {"ID": "14", "COUNT": "3", "MIN": "10", "STEP": "2"}, (2, 3)),
        ((None, 10), {"ID": "7", "COUNT": "2", "MIN": "3"}, (7, 10)),
        ((0, 2), {"ID": "7", "COUNT": "9", "MIN": "0"}, (0, 2)),
    ],
)
def test_the_shard_of_a_slurm_task(given, slurm, expected) -> None:
    environment = {f"SLURM_ARRAY_TASK_{name}": value for name, value in slurm.items()}
    assert resolve_shard(ShardSettings(*given), environment) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [((3, 3), "indices are 0 to 2"), ((1, None), "give shard.count too"), ((None, 4), "Give shard.index=0 to 3")],
)
def test_a_shard_that_there_is_not(given, message) -> None:
    with pytest.raises(UserError, match=message):
        resolve_shard(ShardSettings(*given), {})
