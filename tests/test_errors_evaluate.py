"""Every mistake in a command of evaluate.py is said before a model loads: one message that names the way out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import safer_instruct.generation.backends
from config.errors import UserError
from config.settings import PromptSetSettings
from safer_instruct.text.prompt_sets import load_prompt_sets
from tests.evaluations import run_evaluate

ROOT = Path(__file__).resolve().parents[1]
SECRET = "words that belong into no message"
ROW = {"id": "a", "instruction": SECRET, "kind": "unsafe", "label": "x"}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """A model that loads although the command is wrong fails the test."""
    monkeypatch.setattr(
        safer_instruct.generation.backends, "load_causal_lm", lambda *_, **__: pytest.fail("a model was loaded")
    )


@pytest.fixture
def prompts(tmp_path):
    """Writes prompt rows to a file and gives its path."""

    def write(*rows, name="p.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def message_of(tmp_path, *arguments):
    """What the user reads: the errors of the command line, or else the first that shows on reading files."""
    with pytest.raises(UserError) as raised:
        run(tmp_path, *arguments)
    message = str(raised.value)
    assert SECRET not in message
    return message


def run(tmp_path, *arguments):
    keys = [argument.split("=")[0] for argument in arguments]
    output = [] if "output" in keys else [f"output={tmp_path / 'out'}"]
    expert = [] if "expert" in keys else ["expert=rules"]
    run_evaluate(*expert, *output, *arguments)


def test_no_model_and_no_prompts_are_both_said(tmp_path):
    message = message_of(tmp_path)
    assert "no models: name at least one, models.NAME.path=FOLDER" in message
    assert "no prompts" in message


def test_prompts_without_a_judge(tmp_path, tiny_model_folder, prompts):
    with pytest.raises(UserError, match=r"expert is not set: write expert=\.\.\., one of rules, local, openai"):
        run_evaluate(f"models.a.path={tiny_model_folder}", f"prompts.p.path={prompts(ROW)}", f"output={tmp_path}/out")


def test_unknown_keys_and_wrong_types_of_named_entries_are_all_said(tmp_path):
    words = ("models.a.pth=x", "prompts.p.max_rows=many", "prompts.p.knd=unsafe", "model.b.path=y")
    message = message_of(tmp_path, *words)
    assert "no key models.a.pth; did you mean models.a.path?" in message
    assert "no key model.b.path; did you mean models.b.path?" in message
    assert "prompts.p.max_rows=many" in message
    assert "did you mean prompts.p.kind?" in message


def test_missing_files_and_folders_are_all_said(tmp_path, tiny_model_folder):
    message = message_of(tmp_path, f"models.a.path={tmp_path}/none", f"prompts.p.path={tmp_path}/none.jsonl")
    assert f"models.a.path={tmp_path}/none" in message
    assert f"prompts.p.path={tmp_path}/none.jsonl" in message


def test_values_out_of_range_are_all_said(tmp_path, tiny_model_folder, prompts):
    path = prompts(ROW)
    message = message_of(
        tmp_path, f"models.a.path={tiny_model_folder}", "models.a.dtype=float31", "models.a.template=alpacca",
        f"prompts.p.path={path}", "prompts.p.kind=unsave", "prompts.p.max_rows=0", "samples_per_set=-1",
        "generation.max_new_tokens=0",
    )  # fmt: skip
    for part in (
        "float31",
        "did you mean alpaca?",
        "did you mean unsafe?",
        "max_rows=0",
        "samples_per_set=-1",
        "max_new_tokens=0",
    ):
        assert part in message


BAD_ROWS = {
    "an empty file": ([], "p.jsonl: the file is empty"),
    "a missing column": (
        [{"id": "a", "prompt": SECRET}],
        "missing column instruction, kind; the columns found are: id, prompt",
    ),
    "no kind at all": (
        [{"instruction": SECRET, "label": "x"}],
        "missing column kind; where all prompts are of one, write prompts.p.kind=unsafe",
    ),
    "an unknown kind": ([ROW, {**ROW, "id": "b", "kind": "evil"}], "p.jsonl:2: kind='evil' is unknown"),
    "the same id twice": ([ROW, {**ROW, "instruction": "y"}], "p.jsonl:2: the id 'a' was already used at"),
    "an empty instruction": ([{**ROW, "instruction": " "}], "p.jsonl:1: the instruction is empty"),
    "half a surrogate pair": (
        [{**ROW, "instruction": "\ud800"}],
        "p.jsonl:1: the instruction holds half of a surrogate",
    ),
    "a reference of numbers": ([{**ROW, "reference": [3]}], "p.jsonl:1: `reference` must be a list of strings"),
    "a reference of nothing": ([{**ROW, "reference": ["|"]}], "p.jsonl:1: `reference` must be a list of strings"),
    "a broken reference": ([{**ROW, "reference": "[oops"}], "p.jsonl:1: `reference` is no JSON list"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_prompt_set_that_cannot_be_read(case, prompts):
    rows, part = BAD_ROWS[case]
    with pytest.raises(UserError) as raised:
        load_prompt_sets({"p": PromptSetSettings(path=str(prompts(*rows)))})
    message = str(raised.value)
    assert part in message
    assert message.startswith("prompts.p: ")
    assert SECRET not in message


def test_all_bad_prompt_sets_are_said(tmp_path, tiny_model_folder, prompts):
    first, second = prompts(name="one.jsonl"), prompts({"x": 1}, name="two.jsonl")
    message = message_of(
        tmp_path, f"models.a.path={tiny_model_folder}", f"prompts.one.path={first}", f"prompts.two.path={second}"
    )
    assert "prompts.one: " in message
    assert "prompts.two: " in message


def test_a_folder_without_weights(tmp_path, prompts):
    (tmp_path / "empty").mkdir()
    message = message_of(tmp_path, f"models.a.path={tmp_path}/empty", f"prompts.p.path={prompts(ROW)}")
    assert "models.a.path" in message
    assert "no config.json" in message


def test_truncated_weights(tmp_path, tiny_model_folder, prompts):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(tiny_model_folder).iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = message_of(tmp_path, f"models.a.path={broken}", f"prompts.p.path={prompts(ROW)}")
    assert "model.safetensors: damaged or truncated" in message


def test_chat_without_a_chat_template(tmp_path, tiny_model_folder, prompts):
    message = message_of(
        tmp_path, f"models.a.path={tiny_model_folder}", "models.a.template=chat", f"prompts.p.path={prompts(ROW)}"
    )
    assert "no chat template" in message


def test_expert_without_a_key(tmp_path, tiny_model_folder, prompts, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    message = message_of(
        tmp_path,
        f"models.a.path={tiny_model_folder}",
        f"prompts.p.path={prompts(ROW)}",
        "expert=openai",
        "expert.model=m",
    )
    assert "OPENAI_API_KEY" in message


def test_expert_that_does_not_answer(tmp_path, tiny_model_folder, prompts, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    message = message_of(
        tmp_path, f"models.a.path={tiny_model_folder}", f"prompts.p.path={prompts(ROW)}", "expert=openai",
        "expert.model=m", "expert.base_url=http://127.0.0.1:9/v1",
    )  # fmt: skip
    assert "127.0.0.1:9" in message


@pytest.mark.parametrize("key", ["induction_report", "stages_file", "curves.sft", "training_data"])
def test_missing_files_of_the_report(key, tmp_path, tiny_model_folder, prompts):
    value = f"[{tmp_path}/none.jsonl]" if key == "training_data" else f"{tmp_path}/none"
    message = message_of(
        tmp_path, f"models.a.path={tiny_model_folder}", f"prompts.p.path={prompts(ROW)}", f"{key}={value}"
    )
    assert f"{tmp_path}/none" in message
    assert key in message


def test_training_data_without_instructions(tmp_path, tiny_model_folder, prompts):
    path = prompts({"text": SECRET}, name="train.jsonl")
    message = message_of(
        tmp_path, f"models.a.path={tiny_model_folder}", f"prompts.p.path={prompts(ROW)}", f"training_data=[{path}]"
    )
    assert "train.jsonl:1: missing column instruction" in message


def test_an_output_that_is_a_file(tmp_path, tiny_model_folder, prompts):
    (tmp_path / "taken").write_text("x")
    message = message_of(
        tmp_path, f"models.a.path={tiny_model_folder}", f"prompts.p.path={prompts(ROW)}", f"output={tmp_path}/taken"
    )
    assert "taken cannot be written to" in message


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["models.a.pth=x"], ["models.a.path=none/none/none", "expert=ruls"]])
def test_the_command_ends_with_status_2_and_no_traceback(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *arguments], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("evaluate.py: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_set_without_a_name_and_a_second_judge_that_is_not_there(tmp_path, tiny_model_folder, prompts):
    message = message_of(tmp_path, "prompts=publishd", "responses=csv")
    assert (
        "prompts=publishd: every entry needs a name: prompts.NAME.path=...; did you mean prompts=published?" in message
    )
    message = message_of(
        tmp_path, f"models.a.path={tiny_model_folder}", f"prompts.p.path={prompts(ROW)}", "expert@second_expert=rules",
        f"second_expert.path={tmp_path}/none.yaml",
    )  # fmt: skip
    assert f"second_expert.path={tmp_path}/none.yaml: there is no such file" in message
