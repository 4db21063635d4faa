"""The model card of a checkpoint, the last lines of a run, and the upload of its model."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar

import pytest
import yaml

from config.checks import check_hub
from config.checks_train import check_train
from config.checksums import find_damage
from config.errors import UserError
from config.rules import check_values
from config.settings import DatasetSettings, ModelSettings, ReverseSettings
from safer_instruct.generation.weights import model_fingerprint
from safer_instruct.measures.statistics import wilson_interval
from tests.tiny_runs import tiny_settings, tiny_trainer
from trainers.distributed import launch as parallel
from trainers.run import model_card
from trainers.run.model_card import render_model_card
from trainers.run.next_command import end_run, last_lines
from trainers.run.run_dir import RunDir

MANIFEST = {"packages": {"torch": "2.x"}, "data": {"train": {"key": "k", "rows": 90}, "eval": {"key": "e", "rows": 10}}}
PROGRESS = {
    "examples": 90,
    "updates": 23,
    "evaluated_at": 88,
    "evaluation": {"rewards_eval/accuracies": 0.7, "loss/eval": 0.5},
}


def settings(tmp_path, **changes):
    data = DatasetSettings(path=str(tmp_path / "secret-place" / "si|x.jsonl"), schema="si", template="hh")
    model = ModelSettings(name_or_path=str(tmp_path), archive=str(tmp_path / "runs" / "si_sft"))
    return tiny_settings(datasets={"si": data}, model=model, license="apache-2.0", **changes)


def test_the_card_tells_data_loss_metrics_and_licence_and_no_path(tmp_path):
    card = render_model_card(asdict(settings(tmp_path)), MANIFEST, PROGRESS)
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["tags"]) == ("apache-2.0", ["safer-instruct", "dpo"])
    assert "base_model" not in front  # a folder of this machine is no id of the hub
    low, high = wilson_interval(7, 10)
    assert f"| `rewards_eval/accuracies` | 0.7000 | [{low:.4f}, {high:.4f}] | 10 |" in card
    assert "| `loss/eval` | 0.5 | - | - |" in card
    assert "90 examples in 23 steps" in card
    assert "after 88 examples" in card
    assert "| `si` | `si\\|x.jsonl` | si | hh |" in card
    assert "| `loss.beta` | `0.1` |" in card
    assert "- train: 90 rows, key `k`" in card
    assert str(tmp_path) not in card
    assert "secret-place" not in card
    hub = settings(tmp_path)
    hub.model.name_or_path = "somebody/llama"
    assert (
        yaml.safe_load(render_model_card(asdict(hub), {}, PROGRESS).split("---")[1])["base_model"] == "somebody/llama"
    )
    reverse = render_model_card(asdict(settings(tmp_path, loss=ReverseSettings())), {}, PROGRESS)
    assert "do not deploy it" in reverse
    assert "do not deploy it" not in card


@pytest.mark.parametrize(("share", "n"), [(0.0, 1), (1.0, 7), (0.5, 2), (0.9, 10)])
def test_the_interval_is_that_of_the_reports(share, n):
    assert model_card.wilson_interval(share, n) == pytest.approx(wilson_interval(round(share * n), n), abs=1e-12)


@pytest.fixture
def run(tmp_path):
    """A run of the trainer that has ended."""
    config = settings(tmp_path)

    def worker(layout):
        with RunDir.open(tmp_path / "run", config=asdict(config), manifest=MANIFEST) as run:
            tiny_trainer(tmp_path, layout, run, config).train()

    parallel.launch(worker, config)
    return RunDir(tmp_path / "run", None)


class Api:
    """The hub, where nobody/x is not ours."""

    uploads: ClassVar = {}

    def create_repo(self, name, *, repo_type, private, exist_ok):
        if name == "nobody/x":
            raise OSError("no login\nmore")
        assert private
        return f"https://hub/{name}"

    def upload_folder(self, **options):
        Api.uploads = options


def test_a_checkpoint_has_its_card_and_its_end_says_what_can_be_done(run, tmp_path, monkeypatch):
    config = settings(tmp_path)
    checkpoint = run.latest.resolve()
    card = checkpoint / "model" / "README.md"
    assert "| `rewards_eval/accuracies` | " in card.read_text()
    assert find_damage(checkpoint, owner=None) == ""
    model = ModelSettings(name_or_path=str(checkpoint / "model"))
    before = model_fingerprint(model)
    card.write_text("something else")
    assert "model/README.md" in find_damage(checkpoint, owner=None)
    assert model_fingerprint(model) == before  # the same model answers the same

    lines = last_lines(config, run)
    assert list(lines) == ["weights", "load", "serve", "continue", "next"]
    assert lines["serve"] == f"vllm serve {run.latest / 'model'}"
    assert f"model.archive={run.path}" in lines["continue"]
    assert "uploaded" not in end_run(config, run)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    config.push_to_hub = "me/model"
    assert end_run(config, run).endswith("uploaded: https://hub/me/model")
    assert (Api.uploads["folder_path"], Api.uploads["repo_type"]) == (checkpoint / "model", "model")
    config.push_to_hub = "nobody/x"
    with pytest.raises(UserError, match=r"nobody/x: the upload failed \(no login\).*the same command tries"):
        end_run(config, run)


def test_an_upload_without_a_login_or_a_name_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in str(next(check_hub("me/model")))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    assert not list(check_hub("me/model"))
    assert not list(check_hub(None))
    faults = check_train(settings(tmp_path, push_to_hub="me/model", debug=True))
    assert any("push_to_hub=me/model: debug=true writes no checkpoint" in str(fault) for fault in faults)
    faults = check_values(settings(tmp_path, push_to_hub="model"))
    assert any("push_to_hub=model: must be USER/NAME" in str(fault) for fault in faults)
