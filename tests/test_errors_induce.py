"""Mistakes of a user of induce.py: one complete message each, before any model loads, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import induce
import safer_instruct.induction.shard
from config.checks_induce import check_induce
from config.errors import UserError
from config.schema import compose_config
from config.settings import CorpusSettings, InduceConfig, OpenAIExpertSettings, RulesExpertSettings, ShardSettings
from safer_instruct.generation import backends
from safer_instruct.generation.completions import Generation
from safer_instruct.induction.ledger import read_ledger
from safer_instruct.text.corpus import read_corpus

REPOSITORY = Path(__file__).resolve().parents[1]
SECRET = "zebra-secret"


@pytest.fixture(autouse=True)
def no_model(monkeypatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded before the mistake was found")

    monkeypatch.setattr(backends, "load_causal_lm", load)
    monkeypatch.setattr(backends, "load_tokenizer", load)


@pytest.fixture
def config(tmp_path, tiny_model_folder) -> InduceConfig:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"response": f"{SECRET} {i}"}) + "\n" for i in range(5)))
    config = InduceConfig(output=str(tmp_path / "out"), device="cpu")
    config.corpus.path = str(corpus)
    config.model.name_or_path = tiny_model_folder
    config.expert = RulesExpertSettings(path="quickstart/rules.yaml")
    return config


def message_of(config: InduceConfig) -> str:
    """What the command says: all errors of its check, or else the UserError of its work."""
    errors = check_induce(config)
    if errors:
        return "\n".join(map(str, errors))
    with pytest.raises(UserError) as caught:
        induce.main(config)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def with_corpus(config: InduceConfig, name: str, content: str | bytes, **columns) -> InduceConfig:
    path = Path(config.corpus.path).with_name(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return replace(config, corpus=CorpusSettings(path=str(path), **columns))


def test_a_corpus_that_is_not_there(config) -> None:
    config.corpus.path = config.corpus.path.replace("corpus.jsonl", "corpus.json")
    message = message_of(config)
    assert "corpus.path=" in message
    assert "did you mean" in message


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("c.jsonl", "", {}, "c.jsonl: the file is empty"),
        ("c.csv", "", {}, "c.csv: the file is empty"),
        ("c.jsonl", '{"text": "x", "label": "y"}\n', {}, r"missing column response; .* are: text, label"),
        ("c.csv", "text,kind\nx,y\n", {"response_column": "answer"}, r"missing column answer; .*: text, kind"),
        ("c.csv", "response\nx\n", {"label_column": "kind"}, r"missing column kind; .*: response"),
        ("c.csv", "response\nx\n", {"id_column": "key"}, r"missing column key; .*: response"),
        ("c.jsonl", b'{"response": "a"}\n{"response": "\xff\xfe"}\n', {}, r"c.jsonl:2: bytes that are not UTF-8"),
        ("c.csv", b"response\na\nb\xe4\n", {}, r"c.csv:3: bytes that are not UTF-8"),
        ("c.jsonl", '{"response": ""}\n{"response": 7}\n{"response": null}\n', {},
         r"none of its rows can be used \(empty_response: 2, response_not_text: 1\)"),
        ("c.jsonl", '{"response": "a"}\n{"response": " "}\n', {"on_bad_row": "error"}, r"c.jsonl:2: empty_response"),
        ("c.txt", "hello", {}, r"a data file ends in one of"),
    ],
)  # fmt: skip
def test_a_corpus_that_cannot_be_read(config, name, content, columns, message) -> None:
    found = message_of(with_corpus(config, name, content, **columns))
    assert re.search(message, found), found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.jsonl", f'{{"response": "a"}}\n{{"response": "b"}}\n{{"response": "{SECRET}', "c.jsonl:3: broken JSON"),
        ("c.csv", f'response,label\na,y\nb,y\n"{SECRET},y\nz,y\n', "c.csv:4: broken CSV quoting"),
    ],
)
def test_a_corpus_that_breaks_off_keeps_the_rows_before(config, monkeypatch, name, content, message) -> None:
    class Echo:
        def generate(self, requests):
            return (Generation(request.id, f"Say {request.prompt.body}") for request in requests)

    monkeypatch.setattr(safer_instruct.induction.shard, "build_reversed_model", lambda *_: Echo())
    config = with_corpus(config, name, content)
    found = message_of(config)
    assert message in found
    assert "The 2 rows of this shard before it are done and kept" in found
    _, records = read_ledger(Path(config.output) / "ledger" / "induce-00000-of-00001.jsonl")
    assert [record["instruction"] for record in records.values()] == ["Say a", "Say b"]
    assert not (Path(config.output) / "si.jsonl").exists()
    assert "must be readable to its end before stage=merge" in message_of(replace(config, stage="merge"))
    if name.endswith("csv"):
        mended = with_corpus(config, name, "response,label\na,y\nb,y\nc,y\n")
    else:
        mended = with_corpus(config, name, "".join(json.dumps({"response": text}) + "\n" for text in "abc"))
    induce.main(mended)
    assert len(read_ledger(Path(config.output) / "ledger" / "induce-00000-of-00001.jsonl")[1]) == 3


def test_a_line_with_another_number_of_fields_is_one_bad_row(config) -> None:
    content = f"response,label\na,y\n{SECRET},y,z\nb,y\n"
    corpus = read_corpus(with_corpus(config, "c.csv", content).corpus)
    assert [example.rejected for example in corpus.examples] == ["a", "b"]
    assert (corpus.num_rows, corpus.dropped.counts, corpus.broken) == (3, {"wrong_number_of_fields": 1}, "")
    found = message_of(with_corpus(config, "c.csv", content, on_bad_row="error"))
    assert "c.csv:3: 3 fields where the header has 2" in found


def test_the_key_of_the_expert_is_missing(config, monkeypatch) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    config.expert = OpenAIExpertSettings(model="m", api_key_env="TEST_KEY")
    assert "TEST_KEY" in message_of(config)


def test_the_expert_cannot_be_reached(config, monkeypatch) -> None:
    monkeypatch.setenv("TEST_KEY", "sk-nothing")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    config.expert = OpenAIExpertSettings(model="m", api_key_env="TEST_KEY", base_url=url, max_retries=0)
    message = message_of(config)
    assert url in message
    assert "expert.base_url" in message
    assert "sk-nothing" not in message
    assert not Path(config.output).exists()


def test_no_expert(config) -> None:
    assert "expert" in message_of(replace(config, expert="???"))
    assert "expert" in message_of(replace(config, expert=None))


def test_the_rules_file_is_missing(config) -> None:
    config.expert = RulesExpertSettings(path="no/such/rules.yaml")
    assert "expert.path=no/such/rules.yaml" in message_of(config)


def test_a_ledger_of_another_configuration(config) -> None:
    path = Path(config.output) / "ledger" / "induce-00000-of-00001.jsonl"
    path.parent.mkdir(parents=True)
    header = {"format": 1, "configuration": {"generation.temperature": 0.7}}
    path.write_text(json.dumps(header) + "\n")
    message = message_of(config)
    assert "generation.temperature was 0.7, is now 0.0" in message
    assert "output=FOLDER" in message
    assert json.loads(path.read_text()) == header


def test_another_number_of_shards(config) -> None:
    path = Path(config.output) / "ledger" / "induce-00001-of-00004.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("")
    config.shard = ShardSettings(0, 2)
    assert "for 4 shards, and this command works on shard.count=2: give shard.count=4" in message_of(config)


@pytest.mark.parametrize("shard", [ShardSettings(3, 3), ShardSettings(-1, 3), ShardSettings(1, None)])
def test_a_shard_out_of_range(config, shard) -> None:
    config.shard = shard
    assert f"shard.index={shard.index}" in message_of(config)


def test_a_stage_before_its_time(config) -> None:
    assert "stage that writes it" in message_of(replace(config, stage="filter"))
    assert "no ledgers to merge" in message_of(replace(config, stage="merge"))


def test_an_exclusion_without_instructions(config, tmp_path) -> None:
    from safer_instruct.text.exclusion import read_instruction_keys

    path = tmp_path / "exclude.csv"
    path.write_text("prompt\nx\n")
    with pytest.raises(UserError, match="missing column instruction; the columns found are: prompt"):
        list(read_instruction_keys(str(path)))


def test_what_a_stage_does_not_use_need_not_be_given(config) -> None:
    merge = compose_config("induce", ["stage=merge", f"corpus.path={config.corpus.path}", f"output={config.output}"])
    assert check_induce(merge) == []


def test_all_mistakes_of_a_command_at_once_and_exit_status_2(config, tmp_path) -> None:
    command = [
        sys.executable, str(REPOSITORY / "induce.py"), f"output={tmp_path / 'out'}", "corpus.path=nowhere.jsonl",
        "model=tinny", "expert=rulez", "stage=fiter", "generation.temperature=hot", "generation.top_q=1",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 2
    assert result.stdout == ""
    for words in ("nowhere.jsonl", "mean tiny", "mean rules", "mean filter", "must be a number", "generation.top_p"):
        assert words in result.stderr, words
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["induce.py", "experiment=reverse"], "induce.py has no group experiment (a group of train.py)"),
        (["evaluate.py", "model=tiny"], "no group model (a group of train.py and induce.py); did you mean models?"),
        (
            ["evaluate.py", "expert.model=m"],
            "expert is not set; it belongs to expert=guard, expert=local, expert=openai, expert=strongreject",
        ),
    ],
)  # fmt: skip
def test_a_group_of_another_entrypoint(command, message, tmp_path) -> None:
    script, *arguments = command
    words = [sys.executable, str(REPOSITORY / script), *arguments]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
