"""Whoever asks a model in a template asks as its run was trained, and says where a command asks otherwise."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import induce
from config.errors import UserError
from config.schema import compose_config
from config.settings import BackendSettings, LocalExpertSettings, ModelSettings, ReplaySettings, RoundTripSettings
from safer_instruct.experts.expert import build_expert
from safer_instruct.generation.completions import Request
from safer_instruct.generation.hf import HFGenerator
from safer_instruct.induction.benign import starting_model
from safer_instruct.induction.round_trip import RoundTrip
from safer_instruct.text.prompts import Prompt

CPU = torch.device("cpu")
# Key of the template and of the model in the command -> (model, template, system prompt) -> what names all that the
# answers depend on.
ASKING: dict[tuple[str, str], Callable[..., str]] = {
    ("replay", "model"): lambda model, *asked: str(
        starting_model(replace(ReplaySettings(), **told(asked)), model, BackendSettings(), CPU)[1]["model_fingerprint"]
    ),
    ("roundtrip", "roundtrip.model"): lambda model, *asked: (
        RoundTrip(RoundTripSettings(model, **told(asked)), CPU, induce.logps_of).fingerprint
    ),
    ("expert", "expert.model"): lambda model, *asked: build_expert(
        LocalExpertSettings("local", model, **told(asked)), CPU
    ).fingerprint("screen"),
}


def told(asked: Sequence[str | None]) -> dict[str, Any]:
    return dict(zip(("template", "system"), asked, strict=False))


def a_run(folder: Path, model: str, **settings: str | None) -> str:
    shutil.copytree(model, folder / "checkpoints" / "step-8" / "model")
    (folder / "LATEST").symlink_to("checkpoints/step-8")
    datasets = {"a": {"path": "x", "schema": "si", **settings}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"datasets": datasets}))
    return str(folder)


@pytest.mark.parametrize(("key", "model_key"), ASKING)
@pytest.mark.parametrize("as_archive", [True, False])
def test_a_run_is_asked_as_it_was_trained(
    key: str, model_key: str, as_archive: bool, tiny_model_folder: str, tmp_path: Path, caplog: Any
) -> None:
    run = a_run(tmp_path, tiny_model_folder, template="hh")
    model = ModelSettings(tiny_model_folder, archive=run) if as_archive else ModelSettings(run)
    ask = ASKING[key, model_key]
    assert ask(model, None) == ask(model, "hh")
    assert not caplog.messages
    assert ask(model, "plain") != ask(model, "hh")
    (note,) = caplog.messages
    path = f"{model_key}.{'archive' if as_archive else 'name_or_path'}={run}"
    assert note.startswith(f"note: {key}.template=plain, but {path} was trained with template=hh; leave {key}.template")


@pytest.mark.parametrize(("key", "model_key"), ASKING)
def test_a_run_is_told_what_it_was_told_in_training(
    key: str, model_key: str, tiny_model_folder: str, tmp_path: Path, caplog: Any
) -> None:
    run = a_run(tmp_path / "told", tiny_model_folder, template="vicuna", system="Be brief.")
    untold = a_run(tmp_path / "untold", tiny_model_folder, template="vicuna", system=None)
    ask, model, other = ASKING[key, model_key], ModelSettings(run), ModelSettings(untold)
    assert ask(model, None) == ask(model, "vicuna", "Be brief.") == ask(other, None, "Be brief.") != ask(other, None)
    assert not caplog.messages, "a run without a system prompt had what its rows say"
    assert ask(model, None, "Be long.") != ask(model, None)
    assert ask(model, None, "") != ask(model, None)
    path = f"{model_key}.name_or_path={run}"
    assert caplog.messages == [
        f"note: {key}.system={text}, but {path} was trained with system=Be brief.; leave {key}.system out to prompt "
        "it as it was trained"
        for text in ("Be long.", "")
    ]
    with pytest.raises(UserError, match=rf"^{key}\.template=hh has no place for a system prompt; .* {key}\.system=''"):
        ask(model, "hh")


def test_the_system_prompt_stands_in_what_is_asked(tiny_model_folder: str, tmp_path: Path, monkeypatch: Any) -> None:
    model = ModelSettings(a_run(tmp_path, tiny_model_folder, template="vicuna", system="Be brief."))
    asked: list[str] = []

    def decode(generator: Any, ids: Sequence[str], rows: Sequence[list[int]]) -> list[list[int]]:
        asked.extend(generator.tokenizer.decode(row, skip_special_tokens=True) for row in rows)
        return [[2] for _ in rows]

    monkeypatch.setattr(HFGenerator, "_decode", decode)
    generator, _ = starting_model(ReplaySettings(), model, BackendSettings(max_new_tokens=8), CPU)
    assert generator is not None
    list(generator.generate([Request("a", Prompt("", "Name a fruit.", ""))]))
    assert asked == ["Be brief. USER: Name a fruit. ASSISTANT:"]


@pytest.mark.parametrize("name", ["local", "strongreject"])
def test_an_expert_has_no_template_of_its_own_in_its_preset(name: str, tiny_model_folder: str) -> None:
    words = ["output=out", "corpus.path=README.md", "stage=filter", f"expert={name}"]
    expert = compose_config("induce", [*words, f"expert.model.name_or_path={tiny_model_folder}"]).expert
    assert (expert.template, expert.system) == (None, None)


@pytest.mark.parametrize(("key", "model_key"), ASKING)
def test_a_chat_model_without_a_run(
    key: str, model_key: str, tiny_model_folder: str, tmp_path: Path, caplog: Any
) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    ask, model = ASKING[key, model_key], ModelSettings(str(folder))
    default = "chat" if key == "expert" else "alpaca"  # an expert is told what to do: that takes a chat model
    assert ask(model, None) == ask(model, default)
    notes = [f"note: {key} uses template=alpaca: there is no run of train.py at {model_key}.name_or_path="]
    assert [note[: len(notes[0])] for note in caplog.messages] == notes * (default == "alpaca")
