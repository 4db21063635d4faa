"""stage=status reads progress, rate, time left and cost from ledgers alone, while they grow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import UserError
from safer_instruct.induction import ledger
from safer_instruct.induction.ledger import Ledger, shard_path
from safer_instruct.induction.status import read_progress, render_status


def write(
    path: Path, rows: int, done: int, monkeypatch, *, start: float = 1000.0, seconds: float = 2.0, **record
) -> None:
    clock = iter(start + seconds * i for i in range(done))
    monkeypatch.setattr(ledger.time, "time", lambda: next(clock))
    with Ledger(path, {"a": 1}, num_rows=rows) as file:
        for i in range(done):
            file.append({"id": f"row{i}", **record})


def test_one_ledger(tmp_path, monkeypatch) -> None:
    path = tmp_path / "filter.jsonl"
    write(path, 100, 51, monkeypatch, keep=True, reason="keep", tokens=3, cost=0.25)
    progress = read_progress(path, now=1101.0)
    assert (progress.done, progress.rows, progress.kept) == (51, 100, 51)
    assert progress.cost == pytest.approx(51 * 0.25)
    assert progress.rate == pytest.approx(0.51)  # 51 rows in 100 s
    assert progress.written_at == 1100.0
    assert read_progress(path, now=1300.0).rate == 0.0, "nothing has been written for long"
    with path.open("a") as file:
        file.write('{"id": "torn", "cost": 5')
    assert read_progress(path, now=1101.0) == progress
    assert read_progress(tmp_path / "none.jsonl", now=0.0).done == 0


def test_the_rate_is_that_of_the_last_ten_minutes(tmp_path, monkeypatch) -> None:
    path = tmp_path / "induce.jsonl"
    write(path, 30_000, 12_000, monkeypatch, seconds=0.5)
    assert read_progress(path, now=1000.0 + 6000.0).rate == pytest.approx(2.0, rel=0.01)


def test_the_table_of_all_shards(tmp_path, monkeypatch) -> None:
    """Shard 0 is done, shard 1 is in the middle of its filter, shard 2 has not begun."""
    for index, done in ((0, 40), (1, 40)):
        write(shard_path(tmp_path, "induce", index, 3), 40, done, monkeypatch, tokens=1)
    write(shard_path(tmp_path, "filter", 0, 3), 40, 40, monkeypatch, keep=False, cost=0.5)
    write(shard_path(tmp_path, "filter", 1, 3), 40, 10, monkeypatch, start=1062.0, keep=True, cost=0.5)
    write(shard_path(tmp_path, "respond", 0, 3), 0, 0, monkeypatch)
    text = render_status(tmp_path, now=1080.0)
    lines = text.splitlines()
    assert lines[0] == "| shard | induce | filter | respond | rows/s | left | cost | last row |"
    assert lines[2] == "| 1 | 40/40 | 10/40 | 0/? | 0.6 | 54s | 5.00 | 0s ago |"
    assert lines[3].startswith("| 2 | 0/? | 0/? | 0/? | 0.0 | - | 0.00 | - |")
    assert "filter: 50 of about 120 rows, 10 kept" in text
    assert "cost 25.00" in text
    assert text.endswith("1 of 3 shards are done.")


def test_no_ledgers_yet(tmp_path) -> None:
    with pytest.raises(UserError, match="no ledgers yet"):
        render_status(tmp_path)


def test_time_stamps_are_no_part_of_a_record(tmp_path, monkeypatch) -> None:
    path = tmp_path / "l.jsonl"
    write(path, 1, 1, monkeypatch, tokens=1)
    assert json.loads(path.read_text().splitlines()[1]) == {"id": "row0", "tokens": 1, "at": 1000.0}
    with Ledger(path, {"a": 1}) as file:
        assert file.records == {"row0": {"id": "row0", "tokens": 1}}


def test_status_does_without_torch(tmp_path, monkeypatch) -> None:
    """It is asked every few minutes on a login node, where the import alone takes seconds."""
    write(shard_path(tmp_path, "induce", 0, 1), 4, 2, monkeypatch, tokens=1)
    code = (
        "import sys; from pathlib import Path; from safer_instruct.induction.status import render_status; "
        "print(render_status(Path(sys.argv[1]))); print(sorted({'torch', 'transformers', 'duckdb'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    assert "| 0 | 2/4 |" in shown
    assert shown.splitlines()[-1] == "[]"
