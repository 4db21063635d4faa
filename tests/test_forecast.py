"""`dry_run=true` of induce.py and evaluate.py: counts against arithmetic, and nothing is loaded, asked or written."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

import evaluate
import induce
from config.checks_induce import check_induce
from config.schema import compose_config
from safer_instruct.experts.prompts import ROLES
from safer_instruct.induction.forecast import measure
from safer_instruct.induction.ledger import Ledger
from safer_instruct.text.prompts import render_prompt, render_reversed

RESPONSES = [f"answer number {i} " + "and more " * (i % 5) for i in range(30)]
PAID = ["expert=openai", "expert.model=m", "expert.price_prompt=2", "expert.price_completion=8"]


@pytest.fixture
def command(tmp_path, tiny_model_folder, monkeypatch):
    """An induction whose server is not there: a question would be an error. And loading weights would be one."""
    monkeypatch.setenv("TEST_KEY", "x")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"response": text}) + "\n" for text in RESPONSES))
    return [
        f"corpus.path={corpus}", "model=blank_model", f"model.name_or_path={tiny_model_folder}", *PAID,
        "expert.base_url=http://127.0.0.1:9/v1", "expert.api_key_env=TEST_KEY", f"output={tmp_path / 'si'}",
        "generation.max_new_tokens=40", "dry_run=true",
    ]  # fmt: skip


def table(text: str) -> dict[str, dict[str, str]]:
    """The cells of a printed table by the names of row and column."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_an_induction_that_has_not_begun(command, tmp_path, tiny_model_folder, capsys):
    induce.main(compose_config("induce", [*command, "rate.induce=10", "rate.filter=0.5"]))
    said = capsys.readouterr().out
    found = table(said)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    prompts = sum(len(tokenizer(render_reversed(text).text)["input_ids"]) for text in RESPONSES)
    assert found["induce"] == {
        "stage": "induce", "rows": "30", "to do": "30", "calls": "30", "tokens": f"<= {prompts + 30 * 40:,}",
        "cost": "-", "hours of one process": f"{30 / 10 / 3600:.2f}",
    }  # fmt: skip
    screened = sum(len(ROLES["screen"].render("", text).text) / 4 + 40 for text in RESPONSES)
    assert found["filter"]["tokens"] == f"<= {screened + 30 * 512:,.0f}"
    assert found["filter"]["cost"] == f"<= {(2 * screened + 8 * 30 * 512) / 1e6:,.2f}"
    assert found["filter"]["hours of one process"] == f"<= {30 / 0.5 / 3600:.2f}"
    assert (found["respond"]["rows"], found["respond"]["hours of one process"]) == ("<= 30", "?")
    assert "rate.STAGE" in said
    assert not (tmp_path / "si").exists()


def test_what_is_done_tells_what_is_left(command, tmp_path, capsys, monkeypatch):
    induce.main(compose_config("induce", command))
    capsys.readouterr()
    ids = iter(f"id{i}" for i in range(100))
    clock = iter(1000.0 + 4.0 * i for i in range(100))
    monkeypatch.setattr("safer_instruct.induction.ledger.time.time", lambda: next(clock))
    ledger = tmp_path / "si" / "ledger" / "induce-00000-of-00001.jsonl"
    with Ledger(ledger, {"model": "x"}, num_rows=30) as open_ledger:
        said = {"response": "", "instruction": "Say it.", "truncated": False, "prompt_cut": False, "tokens": 50}
        for _ in range(24):
            open_ledger.append({"id": next(ids), **said})
    known = measure([ledger])
    assert (known.rows, known.tokens, known.seconds) == (24, 24 * 50, 23 * 4.0)
    assert measure([ledger], {"id3", "id5"}.__contains__).rows == 2
    induce.main(compose_config("induce", [*command, "stage=induce"]))
    found = table(capsys.readouterr().out)["induce"]
    assert (found["to do"], found["tokens"]) == ("6", "~ 300")
    assert found["hours of one process"] == f"{6 / (24 / 92) / 3600:.2f}"


def test_an_evaluation(tmp_path, tiny_model_folder, monkeypatch, capsys):
    monkeypatch.setenv("TEST_KEY", "x")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    prompts = tmp_path / "prompts.jsonl"
    asked = [f"What is {i}?" for i in range(12)]
    prompts.write_text("".join(json.dumps({"instruction": text}) + "\n" for text in asked))
    arguments = [
        f"models.base.path={tiny_model_folder}", f"models.dpo.path={tiny_model_folder}", "helpfulness.baseline=base",
        f"prompts.a.path={prompts}", "prompts.a.kind=benign", *PAID, "expert.base_url=http://127.0.0.1:9/v1",
        "expert.api_key_env=TEST_KEY", f"output={tmp_path / 'report'}", "generation.max_new_tokens=8", "dry_run=true",
        "rate.generate=3", "rate.judge=1",
    ]  # fmt: skip
    evaluate.main(compose_config("evaluate", arguments))
    found = table(capsys.readouterr().out)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokens = sum(len(tokenizer(render_prompt("alpaca", text).text)["input_ids"]) + 8 for text in asked)
    assert (found["generate dpo"]["rows"], found["generate dpo"]["tokens"]) == ("12", f"<= {tokens:,}")
    assert found["generate base"]["hours of one process"] == f"{12 / 3 / 3600:.2f}"
    judged = sum(len(ROLES["judge"].render(text, "").text) / 4 + 8 for text in asked)
    assert found["judge"]["cost"] == f"<= {2 * (2 * judged + 8 * 12 * 512) / 1e6:,.2f}"
    assert found["compare"]["calls"] == "<= 24"
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=merge"], "dry_run=true: only commands that ask models about rows have it; leave it out with stage="),
        (["rate.inducee=3"], "rate.inducee=3.0: no such stage; did you mean induce?"),
        (["rate.induce=0"], "rate.induce=0.0: must be above 0"),
    ],
)
def test_what_cannot_be_foretold(command, words, message):
    faults = check_induce(compose_config("induce", [*command, *words]))
    assert [fault for fault in faults if message in str(fault)], faults
