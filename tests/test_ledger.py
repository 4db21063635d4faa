"""Ledgers: what counts is never lost or computed twice, whatever a kill leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from config.errors import UserError
from safer_instruct.induction.ledger import Ledger, is_final, read_ledger, run_stage, shard_count, shard_path
from safer_instruct.induction.status import read_progress
from safer_instruct.text.examples import Example

CONFIGURATION = {"model": "tiny", "generation.temperature": 0.7, "generation.seed": 0}
RECORDS = [
    {"id": "a", "text": "plain"},
    {"id": "b", "text": "gr\u00fc\u00dfe \u6f22\u5b57 \U0001f600"},
    {"id": "c", "text": 'line\nbreak \u2028 and "quotes"'},
]


@pytest.fixture(autouse=True)
def one_moment(monkeypatch) -> None:
    monkeypatch.setattr("safer_instruct.induction.ledger.time.time", lambda: 1.0)


def filled(path: Path) -> bytes:
    with Ledger(path, CONFIGURATION) as ledger:
        for record in RECORDS:
            ledger.append(record)
    return path.read_bytes()


def test_records_come_back_in_order(tmp_path) -> None:
    path = tmp_path / "sub" / "ledger.jsonl"
    filled(path)
    configuration, records = read_ledger(path)
    assert configuration == CONFIGURATION
    assert list(records.values()) == RECORDS
    with Ledger(path, CONFIGURATION) as ledger:
        assert list(ledger.records) == ["a", "b", "c"]
        with pytest.raises(ValueError, match="row a is in the ledger already"):
            ledger.append({"id": "a"})


def test_a_tail_torn_at_any_byte_is_dropped_and_computed_again(tmp_path) -> None:
    whole = filled(tmp_path / "whole.jsonl")
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 4, "a line break inside a text must not break a record"
    last_starts = len(whole) - len(lines[-1])
    middle_starts = last_starts - len(lines[2])  # the multi-byte record
    path = tmp_path / "torn.jsonl"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Ledger(path, CONFIGURATION) as ledger:
            num_records = 0 if cut < len(lines[0]) else whole[:cut].count(b"\n") - 1
            assert len(ledger.records) == num_records
            for record in RECORDS[num_records:]:
                ledger.append(record)
        assert path.read_bytes() == whole
    assert middle_starts < last_starts < len(whole)


@pytest.mark.parametrize(
    "garbage",
    [b"\x00" * 50, b'{"id": "d", "te', b"\xe6\xbc", b"\xff\xfe garbage", b"{]\n", b"\x00\x00\n", b"17\n", b"\n"],
)
def test_garbage_at_the_end_is_dropped(tmp_path, garbage) -> None:
    path = tmp_path / "ledger.jsonl"
    whole = filled(path)
    path.write_bytes(whole + garbage)
    assert len(read_ledger(path)[1]) == 3
    assert path.read_bytes() == whole + garbage, "reading must change nothing"
    with Ledger(path, CONFIGURATION) as ledger:
        assert len(ledger.records) == 3
    assert path.read_bytes() == whole


def test_a_broken_line_inside_is_named(tmp_path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = filled(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{broken\n", *lines[2:]]))
    with pytest.raises(UserError, match=r"ledger\.jsonl:3: broken line"):
        Ledger(path, CONFIGURATION)


def test_another_configuration_is_refused_by_key(tmp_path) -> None:
    path = tmp_path / "ledger.jsonl"
    whole = filled(path)
    other = {"model": "tiny", "generation.temperature": 1.0, "generation.top_p": 0.9, "generation.seed": 0}
    with pytest.raises(UserError) as caught:
        Ledger(path, other)
    message = str(caught.value)
    assert "generation.temperature was 0.7, is now 1.0" in message
    assert "generation.top_p was null, is now 0.9" in message
    assert "model was" not in message
    assert "output=FOLDER" in message
    assert path.read_bytes() == whole


def test_two_writers_are_refused(tmp_path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, CONFIGURATION), pytest.raises(UserError, match="another process is writing"):
        Ledger(path, CONFIGURATION)
    Ledger(path, CONFIGURATION).__exit__()  # free again


def test_not_a_ledger(tmp_path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match="not a ledger"):
        Ledger(path, CONFIGURATION)
    with pytest.raises(UserError, match="no such ledger"):
        read_ledger(tmp_path / "none.jsonl")


def test_a_row_that_is_there_is_not_computed_again(tmp_path) -> None:
    examples = [Example(str(i)) for i in range(10)]
    calls: list[list[str]] = []

    def function(batch):
        calls.append([example.id for example in batch])
        for example in reversed(batch):
            if example.id == "7" and len(calls) == 2:
                raise UserError("the server is gone")
            yield {"id": example.id, "value": int(example.id) ** 2}

    done: list[int] = []
    with Ledger(tmp_path / "l.jsonl", {}) as ledger, pytest.raises(UserError, match="server is gone"):
        run_stage(examples, ledger, function, batch_size=4, progress=done.append)
    assert sum(done) == 4
    with Ledger(tmp_path / "l.jsonl", {}) as ledger:
        run_stage(examples, ledger, function, batch_size=4, progress=done.append)
        assert {int(id): record["value"] for id, record in ledger.records.items()} == {i: i * i for i in range(10)}
    assert calls == [["0", "1", "2", "3"], ["4", "5", "6", "7"], ["4", "5", "6", "7"], ["8", "9"]]
    assert sum(done) == 14


WRITER = """
import sys, time
from pathlib import Path
from safer_instruct.text.examples import Example
from safer_instruct.induction.ledger import Ledger, run_stage

calls = open(sys.argv[2], "a")

def function(batch):
    for example in batch:
        calls.write(example.id + "\\n")
        calls.flush()
        time.sleep(0.002)
        yield {"id": example.id, "text": "\\u6f22" * 2000 + example.id}

with Ledger(Path(sys.argv[1]), {"seed": 0}) as ledger:
    run_stage([Example(str(i)) for i in range(150)], ledger, function, batch_size=16)
"""


def test_kill_9_loses_nothing_and_repeats_only_what_was_in_flight(tmp_path) -> None:
    path, calls = tmp_path / "ledger.jsonl", tmp_path / "calls"
    command = [sys.executable, "-c", WRITER, str(path), str(calls)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    kills, before = 0, set()
    for wait_for in (1, 20, 21, 60, 100, 140):  # kill as soon as so many rows have been called for
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and (not calls.exists() or calls.read_bytes().count(b"\n") < wait_for + kills):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        records = set(read_ledger(path)[1])
        assert before <= records
        before = records
    assert kills == 6
    subprocess.run(command, env=environment, check=True)
    called = calls.read_text().split()
    records = read_ledger(path)[1]
    assert set(records) == {str(i) for i in range(150)}
    assert all(record["text"] == "\u6f22" * 2000 + id for id, record in records.items())
    assert len(path.read_bytes().splitlines()) == 151
    assert len(called) <= 150 + kills, "only the row in flight may be computed again"


def test_shard_files(tmp_path) -> None:
    assert shard_count(tmp_path) is None
    for index in (0, 2):
        shard_path(tmp_path, "induce", index, 3).write_text("")
    assert shard_path(tmp_path, "induce", 2, 3).name == "induce-00002-of-00003.jsonl"
    assert shard_count(tmp_path) == 3
    shard_path(tmp_path, "filter", 0, 4).write_text("")
    with pytest.raises(UserError, match="for 3 and 4 shards"):
        shard_count(tmp_path)


def test_header_is_the_first_line(tmp_path) -> None:
    path = tmp_path / "ledger.jsonl"
    header = json.loads(filled(path).splitlines()[0])
    assert header == {"format": 1, "configuration": CONFIGURATION}
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 9'))
    with pytest.raises(UserError, match="format 9, but this version writes format 1"):
        Ledger(path, CONFIGURATION)


def test_any_text_is_written_and_any_line_read(tmp_path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path, CONFIGURATION) as ledger:
        ledger.append({"id": "a", "text": "half \ud800 caf\u00e9"})
    assert read_ledger(path)[1] == {"a": {"id": "a", "text": "half \ud800 caf\u00e9"}}
    whole = path.read_bytes()
    for broken in (b'{"id": ' + b"9" * 5000 + b"}\n", b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", b"\xff\n"):
        path.write_bytes(whole + broken + whole.splitlines(keepends=True)[1])
        with pytest.raises(UserError, match=r"ledger\.jsonl:3: broken line inside the ledger"):
            read_ledger(path)


def test_what_a_server_refused_is_asked_again_and_what_it_answered_is_not(tmp_path) -> None:
    """A refusal over HTTP is the transport's; the later answer is the row's, to whoever reads the ledger."""
    path = shard_path(tmp_path, "filter", 0, 1)
    refused = {"id": "a", "keep": False, "reason": "abstain_http_403", "label": "", "tokens": 0}
    unreadable = {"id": "b", "keep": False, "reason": "abstain_unreadable", "label": "", "tokens": 1}
    with Ledger(path, CONFIGURATION, num_rows=2) as ledger:
        ledger.append(refused)
        ledger.append(unreadable)
    assert read_progress(path, 1.0).done == 1
    asked: list[str] = []

    def answer(examples):
        for example in examples:
            asked.append(example.id)
            yield {"id": example.id, "keep": True, "reason": "keep", "label": "", "tokens": 2}

    for _ in range(2):
        with Ledger(path, CONFIGURATION) as ledger:
            run_stage([Example("a"), Example("b")], ledger, answer, batch_size=8)
    assert asked == ["a"]
    _, records = read_ledger(path)
    assert (records["a"]["keep"], records["b"]["reason"]) == (True, "abstain_unreadable")
    assert read_progress(path, 1.0).is_done


@pytest.mark.parametrize("why", ["http_403", "malformed_reply", "no_connection", "timeout", "unfinished"])
def test_a_row_without_an_answer_is_asked_again(why):
    assert not is_final({"id": "a", "reason": f"abstain_{why}"})
    assert not is_final({"id": "a", "error": why})
    assert not is_final({"id": "a", "reason": "induction_failed", "error": why}), "what follows from it is as open"
    assert all(is_final({"id": "a", "reason": f"abstain_{said}"}) for said in ("unreadable", "truncated", "empty"))


@pytest.mark.parametrize(
    "changed",
    [
        {"keep": "yes"}, {"keep": None}, {"reason": None}, {"tokens": "3"}, {"cost": "0.1"}, {"at": "now"}, {"id": 3},
        {"label": ...}, {"keep": ...},
    ],
)  # fmt: skip
def test_a_record_that_a_hand_has_changed_is_named_with_its_line(tmp_path, changed) -> None:
    """A key that is gone (...) or of another type; the second header of a ledger that was copied onto another, too."""
    path = shard_path(tmp_path, "filter", 0, 1)
    record = {"id": "b", "keep": False, "reason": "x", "label": "", "tokens": 1}
    with Ledger(path, CONFIGURATION) as ledger:
        ledger.append({**record, "id": "a"})
    before = path.read_text()
    other = {key: value for key, value in (record | changed).items() if value is not ...}
    for line in (json.dumps(other) + "\n", before):
        path.write_text(before + line + json.dumps(record) + "\n")
        with pytest.raises(UserError, match=r"filter-00000-of-00001\.jsonl:3: (no record of this|broken line inside)"):
            read_ledger(path)
