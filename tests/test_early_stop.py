"""Over-refusal among the samples of evaluations: what is drawn, what is counted, and when it ends a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import byte_level_tokenizer

from config.settings import EarlyStopSettings, TrainConfig
from safer_instruct.evaluation.samples import build_sampler, draw_rows
from tests.commands import errors_of
from tests.test_trainer import train
from tests.tiny_runs import tiny_settings
from trainers.run.early_stop import refusal_rates

TOKENIZER = byte_level_tokenizer(add_bos=True)
REFUSAL, ANSWER = "I'm sorry, but I can't help with that.", "Here you are."


def rows(kinds: str) -> list[tuple[str, list[int], list[int]]]:
    """A row for each letter: u with a refusal chosen, b with an answer."""
    texts = {"u": REFUSAL, "b": ANSWER}
    return [
        (f"{kind}{i}", TOKENIZER(f"ask {i}")["input_ids"], TOKENIZER(texts[kind])["input_ids"])
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("kinds", "number", "expected"),
    [
        ("uuuubbbb", 4, ["u0", "u1", "b4", "b5"]),
        ("bubububu", 3, ["b0", "u1", "u3"]),
        ("uuuuub", 4, ["u0", "u1", "u2", "b5"]),
        ("ubbbbb", 4, ["u0", "b1", "b2", "b3"]),
        ("uuuu", 3, ["u0", "u1", "u2"]),
        ("bb", 5, ["b0", "b1"]),
    ],
)
def test_both_kinds_are_drawn_as_far_as_there_are(kinds, number, expected) -> None:
    drawn = draw_rows(rows(kinds), number, TOKENIZER)
    assert [row[0] for row, _ in drawn] == expected
    assert all((kind == "unsafe") == row[0].startswith("u") for row, kind in drawn)


def test_samples_tell_whether_they_decline(monkeypatch) -> None:
    class Generator:
        def __init__(self, *_: object, **__: object) -> None: ...

        def generate_from_tokens(self, prompts):
            for id in prompts:
                text = REFUSAL if id in ("u0", "b2") else ANSWER
                yield type("One", (), {"id": id, "text": text})

    monkeypatch.setattr("safer_instruct.evaluation.samples.HFGenerator", Generator)
    more = {"number": 8, "max_length": 64, "max_new_tokens": 8, "seed": 0}
    samples = build_sampler(rows("uubbbb"), TOKENIZER, **more, tells_refusals=True)(None)
    assert [(one["id"], one["kind"], one["refused"]) for one in samples] == [
        ("u0", "unsafe", True), ("u1", "unsafe", False), ("b2", "benign", True), ("b3", "benign", False),
        ("b4", "benign", False), ("b5", "benign", False),
    ]  # fmt: skip
    assert refusal_rates(samples) == {"refusals_eval/unsafe": 0.5, "refusals_eval/benign": 0.25}
    reverse = build_sampler(rows("uubbbb"), TOKENIZER, **more, tells_refusals=False)(None)
    assert refusal_rates(reverse) == {}


class RefusingMore:
    """A sampler whose model declines one more of ten benign prompts at each evaluation."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: torch.nn.Module) -> list[dict]:
        self.calls += 1
        benign = [{"kind": "benign", "refused": i < self.calls} for i in range(10)]
        return [{"id": str(i), **one} for i, one in enumerate([*benign, {"kind": "unsafe", "refused": True}])]


def settings_of(limit: float | None) -> TrainConfig:
    return replace(
        tiny_settings(n_epochs=4, eval_every=4),
        sample_during_eval=True,
        early_stop=EarlyStopSettings(over_refusal=limit),
    )


def test_a_run_ends_at_the_first_evaluation_above_the_limit(tmp_path) -> None:
    whole, all_rows, _ = train(tmp_path, settings_of(None), sampler=RefusingMore(), run_path=tmp_path / "whole")
    expected = [row for row in all_rows if "refusals_eval/benign" in row]
    assert [row["refusals_eval/benign"] for row in expected][:4] == [0.1, 0.2, 0.3, 0.4]
    assert {row["refusals_eval/unsafe"] for row in expected} == {1.0}
    assert "loss/eval" in expected[0]
    stopped, found, run = train(tmp_path, settings_of(0.3), sampler=RefusingMore(), run_path=tmp_path / "stopped")
    evaluations = [row for row in found if "refusals_eval/benign" in row]
    assert [row["refusals_eval/benign"] for row in evaluations] == [0.1, 0.2, 0.3, 0.4]
    assert stopped.progress.examples == expected[3]["counters/examples"] < whole.progress.examples
    again, rows_again, _ = train(tmp_path, settings_of(0.3), sampler=RefusingMore(), run_path=tmp_path / "stopped")
    assert again.progress.examples == stopped.progress.examples, "typed again, it stays where it stopped"
    assert rows_again == found
    assert (run.path / "LATEST").exists()


def test_a_model_that_over_refuses_from_the_start_takes_a_step(tmp_path) -> None:
    stopped, found, _ = train(tmp_path, settings_of(0.0), sampler=RefusingMore())
    evaluations = [row["counters/examples"] for row in found if "refusals_eval/benign" in row]
    assert evaluations == [0, stopped.progress.examples]
    assert stopped.progress.updates == 1


def test_a_limit_without_samples_is_refused(monkeypatch, capsys, tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"instruction": "a", "chosen": "b"}) + "\n")
    words = ["loss=sft", "model=tiny", "exp_name=x", f"datasets.si.path={Path(path)}", "early_stop.over_refusal=0.1"]
    assert any("write sample_during_eval=true" in line for line in errors_of(words, monkeypatch, capsys))
    words += ["sample_during_eval=true", "early_stop.over_refusal=1"]
    assert any("must lie in [0, 1)" in line for line in errors_of(words, monkeypatch, capsys))
