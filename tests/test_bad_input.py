"""What an entrypoint answers when it is stopped, or typed with spaces round the equals sign."""

from __future__ import annotations

import sys

import pytest

from config.checks import unread_by_expert
from config.checks_train import check_train
from config.rules import check_values, is_below
from config.schema import INTERRUPTED_STATUS, compose_config
from config.settings import LocalExpertSettings, TrainConfig
from tests.commands import errors_of, run_entrypoint, write_pairs


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1"]], ids=["run", "sweep"])
def test_ctrl_c_is_one_line(sweep, tmp_path, tiny_model_folder, monkeypatch, capsys):
    """No traceback, the status of shells (130), and no further point of a sweep is started."""
    monkeypatch.chdir(tmp_path)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    started = []

    def main(config: TrainConfig) -> None:
        started.append(config.seed)
        raise KeyboardInterrupt

    arguments = [
        "model=blank_model", f"model.name_or_path={tiny_model_folder}", f"datasets.si.path={pairs}", "exp_name=a",
        "loss=dpo", *sweep,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        run_entrypoint("config", TrainConfig, check_train, main)
    assert stopped.value.code == INTERRUPTED_STATUS == 130
    assert capsys.readouterr().err == "train.py: interrupted; rerun the same command to resume from what was saved\n"
    assert started == [0]


def test_spaces_round_the_equals_sign(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, *lines = errors_of(["loss", "=", "dpo"], monkeypatch, capsys)
    for line, argument in zip(lines, ("loss", "=", "dpo"), strict=False):
        assert line.startswith(f"  - {argument}: not a valid override: write key=value")


def test_prompt_limit_beyond_the_sum_is_said_and_a_remainder_is_no_error(tmp_path, tiny_model_folder, monkeypatch):
    """3 micro-batches of a batch of 4 leave a remainder, which is weighted exactly: nothing to complain about."""
    monkeypatch.chdir(tmp_path)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 4)
    command = ["model=blank_model", f"model.name_or_path={tiny_model_folder}", f"datasets.si.path={pairs}", "loss=dpo"]
    config = compose_config("config", [*command, "exp_name=a", "batch_size=4", "gradient_accumulation_steps=3"])
    assert check_train(config) == []
    config = compose_config("config", [*command, "exp_name=a", "max_length=8", "max_prompt_length=8"])
    (line,) = check_train(config)
    assert str(line).startswith("max_prompt_length=8: must be smaller than max_length=8")


def test_the_weights_of_a_local_expert_are_asked_for_in_words():
    expert = LocalExpertSettings()
    unread = unread_by_expert(expert, "expert")
    (line,) = (str(fault) for fault in check_values(expert, "expert.") if not is_below(fault.key, unread))
    assert line.startswith("expert.model.name_or_path is not set: write expert.model.name_or_path=..., the folder of")
