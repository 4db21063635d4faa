"""Whoever asks a model in a template asks as its run was trained, and says where a command asks otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import induce
from config.settings import BackendSettings, LocalExpertSettings, ModelSettings, ReplaySettings, RoundTripSettings
from safer_instruct.experts.expert import build_expert
from safer_instruct.induction.benign import starting_model
from safer_instruct.induction.round_trip import RoundTrip

CPU = torch.device("cpu")
# Key of the template and of the model in the command -> (model, template) -> what names all that the answers depend on.
ASKING: dict[tuple[str, str], Callable[[ModelSettings, Any], str]] = {
    ("replay", "model"): lambda model, template: str(
        starting_model(ReplaySettings(template=template), model, BackendSettings(), CPU)[1]["model_fingerprint"]
    ),
    ("roundtrip", "roundtrip.model"): lambda model, template: (
        RoundTrip(RoundTripSettings(model, template), CPU, induce.logps_of).fingerprint
    ),
    ("expert", "expert.model"): lambda model, template: build_expert(
        LocalExpertSettings("local", model, template), CPU
    ).fingerprint("screen"),
}


@pytest.mark.parametrize(("key", "model_key"), ASKING)
@pytest.mark.parametrize("as_archive", [True, False])
def test_a_run_is_asked_as_it_was_trained(
    key: str, model_key: str, as_archive: bool, tiny_model_folder: str, tmp_path: Path, caplog: Any
) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "checkpoints" / "step-8" / "model")
    (tmp_path / "LATEST").symlink_to("checkpoints/step-8")
    datasets = {"a": {"path": "x", "schema": "si", "template": "hh"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    run = str(tmp_path)
    model = ModelSettings(tiny_model_folder, archive=run) if as_archive else ModelSettings(run)
    ask = ASKING[key, model_key]
    assert ask(model, None) == ask(model, "hh")
    assert not caplog.messages
    assert ask(model, "plain") != ask(model, "hh")
    (note,) = caplog.messages
    path = f"{model_key}.{'archive' if as_archive else 'name_or_path'}={run}"
    assert note.startswith(f"note: {key}.template=plain, but {path} was trained with template=hh; leave {key}.template")


@pytest.mark.parametrize(("key", "model_key"), ASKING)
def test_a_chat_model_without_a_run(
    key: str, model_key: str, tiny_model_folder: str, tmp_path: Path, caplog: Any
) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    ask, model = ASKING[key, model_key], ModelSettings(str(folder))
    default = "chat" if key == "expert" else "alpaca"  # an expert is told what to do: that takes a chat model
    assert ask(model, None) == ask(model, default)
    notes = [f"note: {key} is asked with template=alpaca: no run of train.py round {model_key}.name_or_path="]
    assert [note[: len(notes[0])] for note in caplog.messages] == notes * (default == "alpaca")
