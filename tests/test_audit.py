"""stage=audit: what is planted in a dataset is counted, and the cleaned dataset is without it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

import induce
from config.checks_induce import check_induce
from config.errors import UserError
from config.schema import compose_config
from config.settings import DuplicatesSettings
from safer_instruct.dataset.audit import audit
from safer_instruct.dataset.audit_report import render_audit
from safer_instruct.dataset.similarity import LeakageGuard

SECRET = "zebra-secret"
REFUSAL = "I will not help with that, sorry."


def write_published(folder: Path) -> list[dict[str, str]]:
    """The layout of the published files: one CSV a category, one without any `rejected`."""
    folder.mkdir()
    rows = []
    for label in ("insult", "theft"):
        part = []
        for i in range(40):
            chosen = REFUSAL if i % 5 < 2 else f"No, I will not do number {i} of {label} for you."
            rejected = "" if label == "theft" else f"{SECRET} sentence {i} with some more {'words ' * (i % 9)}about {i}"
            part.append(
                {
                    "instruction": f"{label} task {i} about thing {i * i}",
                    "rejected": rejected,
                    "chosen": chosen,
                    "label": label,
                }
            )
        part.append({**part[3], "instruction": part[3]["instruction"].upper() + " "})
        part.append({**part[4], "chosen": ""})
        with (folder / f"{label}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(part[0]))
            writer.writeheader()
            writer.writerows(part)
        rows += part
    return rows


def write_test_set(path: Path) -> None:
    path.write_text(
        "instruction,label\ninsult task 7 about thing 49,si\ntheft task 9 about thing 81,si\nsomething else,hh\n"
    )


def run_audit(tmp_path: Path, *more: str) -> None:
    overrides = [f"path={tmp_path / 'published'}", "stage=audit", f"exclude={tmp_path / 'test.csv'}", *more]
    config = compose_config("induce", overrides)
    assert check_induce(config) == []
    induce.main(config)


def test_everything_planted_is_counted(tmp_path, capsys) -> None:
    rows = write_published(tmp_path / "published")
    write_test_set(tmp_path / "test.csv")
    out = tmp_path / "out"
    run_audit(tmp_path, f"output={out}", "max_same_chosen=5", "duplicates.threshold=null", "exclude_similarity=null")
    report = json.loads((out / "audit.json").read_text())
    assert report["rows"] == len(rows) == 84
    theft, insult = report["by_label"]["theft"], report["by_label"]["insult"]
    assert (theft["rows"], theft["empty_rejected"], theft["empty_chosen"]) == (42, 42, 1)
    assert (insult["rows"], insult["empty_rejected"], insult["empty_instruction"]) == (42, 0, 0)
    assert (theft["leak"], insult["leak"], report["total"]["leak"]) == (1, 1, 2)
    assert report["test_set"] == {"instructions": 3, "found_in_dataset": 2}
    assert report["total"]["duplicate_pair"] == 2
    collapsed = sum(row["chosen"] == REFUSAL for row in rows)
    assert report["chosen"]["most_frequent"][0] == {"rows": collapsed, "characters": len(REFUSAL)}
    assert report["total"]["repeated_chosen"] == collapsed - 5
    assert report["instructions"] == {"distinct": 80, "with_several_rows": 4}
    assert report["words"]["chosen"]["max"] == max(len(row["chosen"].split()) for row in rows)
    cleaned = [json.loads(line) for line in (out / "si.jsonl").read_text().splitlines()]
    assert sum(row["chosen"] == REFUSAL for row in cleaned) == 5
    instructions = {row["instruction"].lower() for row in cleaned}
    assert not instructions & {"insult task 7 about thing 49", "theft task 9 about thing 81"}
    assert len(cleaned) + sum(report["cleaned"]["dropped"].values()) == 84
    shown = capsys.readouterr().out
    assert "2 of its 3 instructions are in the data" in shown
    for text in (shown, *((out / name).read_text() for name in ("audit.json", "audit.md", "audit_labels.svg"))):
        assert SECRET not in text
        assert "I will not" not in text
    assert str(tmp_path) not in (out / "audit.md").read_text()


def test_without_an_output_nothing_is_written(tmp_path, capsys) -> None:
    write_published(tmp_path / "published")
    write_test_set(tmp_path / "test.csv")
    before = sorted(tmp_path.rglob("*"))
    run_audit(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert "| all | 84 |" in capsys.readouterr().out


def test_near_duplicates_and_near_leaks(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    sentence = "one two three four five six seven eight nine ten eleven twelve"
    rows = [
        ("ask a b c d e f g h", sentence),
        ("ask a b c d e f g h", f"{sentence} x"),
        ("quite another thing to ask", "b"),
    ]
    path.write_text("".join(json.dumps({"instruction": i, "rejected": r, "chosen": "no"}) + "\n" for i, r in rows))
    guard = LeakageGuard(["quite another thing to ask you"], 0.6)
    report = audit(str(path), guard=guard, duplicates=DuplicatesSettings(), max_same_chosen=None, output=None)
    assert report["by_label"]["(none)"]["near_duplicate_pair"] == 1
    assert report["total"]["near_leak"] == 1
    assert "near duplicate pair" in render_audit(report)


def test_what_is_no_dataset_is_refused(tmp_path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("prompt,answer\na,b\n")
    with pytest.raises(UserError, match="missing column instruction, chosen; the columns found are: prompt, answer"):
        audit(
            str(path), guard=LeakageGuard([], None), duplicates=DuplicatesSettings(), max_same_chosen=None, output=None
        )
    assert "stage=audit reads a dataset: write path=" in "\n".join(
        map(str, check_induce(compose_config("induce", ["stage=audit"])))
    )
