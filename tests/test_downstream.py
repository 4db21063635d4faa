"""lm_eval through evaluate.py on a local task: the accuracy of a call by hand, log-likelihoods equal to ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import evaluate
from config.errors import UserError
from config.settings import DownstreamSettings, EvaluatedModelSettings
from safer_instruct.evaluation.downstream import (
    TASK_LISTS,
    check_choices,
    encode_choice,
    require_lm_eval,
    run_tasks,
    task_names,
)
from safer_instruct.evaluation.respondents import check_model
from tests.evaluations import run_evaluate

QUESTIONS = [
    {"question": f"The {thing} sat on the", "choices": ["mat", "cherry", " banana sum", "42"], "answer": i % 4}
    for i, thing in enumerate(["cat", "sum", "apple", "task", "mat", "banana", "cherry", "list", "fruit", "request"])
]


@pytest.fixture
def tasks(tmp_path):
    """A folder of tasks as lm_eval wants it: one multiple-choice task over a local file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {
        "task": "toy_choice", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{folder}/toy.jsonl"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metadata": {"version": 3},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "toy.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.mark.slow
def test_the_accuracy_is_that_of_lm_eval_called_by_hand(tiny_model_folder, tasks, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    arguments = [
        f"models.tiny.path={tiny_model_folder}", "downstream.tasks=[toy_choice]", f"downstream.include_path={tasks}",
        f"output={tmp_path}/out", "device=cpu",
    ]  # fmt: skip
    run_evaluate(*arguments)
    part = json.loads((tmp_path / "out" / "report.json").read_text())["downstream"]
    found = part["models"]["tiny"]["toy_choice"]["acc"]

    by_hand = [
        sys.executable, "-P", "-m", "lm_eval", "run", "--model", "hf", "--tasks", "toy_choice", "--device", "cpu",
        "--model_args", f"pretrained={tiny_model_folder},dtype=float32", "--include_path", str(tasks),
        "--output_path", str(tmp_path / "hand"),
    ]  # fmt: skip
    subprocess.run(by_hand, check=True, capture_output=True, env=dict(os.environ))
    (results,) = (tmp_path / "hand").rglob("results_*.json")
    expected = json.loads(results.read_text())["results"]["toy_choice"]
    assert found == {"value": expected["acc,none"], "stderr": expected["acc_stderr,none"]}
    assert part["versions"] == {"toy_choice": 3.0}
    assert part["checked"]["tiny"]["n"] == 32
    assert part["checked"]["tiny"]["largest_difference"] < 1e-4
    assert "| toy_choice | acc |" in (tmp_path / "out" / "report.md").read_text()

    # The same command again: nothing is run, and what is there is read.
    monkeypatch.setattr("safer_instruct.evaluation.downstream._run", lambda *_: pytest.fail("lm_eval ran again"))
    run_evaluate(*arguments)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["downstream"] == part


def test_a_choice_is_scored_by_the_models_own_softmax(tiny_model_folder, tiny_model, tokenizer):
    respondent = check_model("tiny", EvaluatedModelSettings(path=tiny_model_folder))
    (score,) = evaluate.score_choices(respondent, [("The cat sat on ", "the mat")], device=torch.device("cpu"))
    head, choice = encode_choice(tokenizer, "The cat sat on ", "the mat")
    assert tokenizer.decode(choice) == " the mat"  # the space belongs to the choice
    logits = tiny_model(torch.tensor([head + choice])).logits[0].double().log_softmax(-1)
    expected = sum(logits[len(head) - 1 + i, token].item() for i, token in enumerate(choice))
    assert score == pytest.approx(expected, abs=1e-5)


def test_log_likelihoods_that_differ_are_an_error(tiny_model_folder):
    respondent = check_model("tiny", EvaluatedModelSettings(path=tiny_model_folder))
    choices = [["a", "b", -2.0], ["c", "d", -3.0]]
    assert check_choices(respondent, choices, lambda *_: [-2.00005, -3.0])["largest_difference"] == pytest.approx(5e-5)
    with pytest.raises(
        UserError, match=r"models\.tiny: lm_eval's log-likelihoods of 2 choices differ .* up to 0\.0005"
    ):
        check_choices(respondent, choices, lambda *_: [-2.0005, -3.0])
    with pytest.raises(UserError, match="differ"):
        check_choices(respondent, choices, lambda *_: [float("nan"), -3.0])


def test_the_rounding_of_a_dtype_is_no_difference(tiny_model_folder):
    choices = [["a", "b", -20.0], ["c", "d", -3.0]]
    off = lambda nats: lambda *_: [-20.0 + nats, -3.0]  # noqa: E731
    half = check_model("tiny", EvaluatedModelSettings(path=tiny_model_folder, dtype="bfloat16"))
    # lm_eval sums in bfloat16, which has no number between -20.125 and -20.0: both answers are right.
    assert check_choices(half, choices, off(0.07))["largest_difference"] == pytest.approx(0.07)
    with pytest.raises(UserError, match=r"up to 2 nats \(up to 0\.6 is rounding in bfloat16\)"):
        check_choices(half, choices, off(2.0))
    with pytest.raises(UserError, match="is rounding in float32"):
        check_choices(check_model("tiny", EvaluatedModelSettings(path=tiny_model_folder)), choices, off(0.07))


@pytest.mark.slow
def test_a_report_can_be_had_in_bfloat16(tiny_model_folder, tasks, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    run_evaluate(
        f"models.tiny.path={tiny_model_folder}", "models.tiny.dtype=bfloat16", "downstream.tasks=[toy_choice]",
        f"downstream.include_path={tasks}", f"output={tmp_path}/out", "device=cpu",
    )  # fmt: skip
    checked = json.loads((tmp_path / "out" / "report.json").read_text())["downstream"]["checked"]["tiny"]
    assert checked["n"] == 32
    assert checked["largest_difference"] > 1e-4  # what was refused before


def test_lists_of_tasks_are_written_out_once():
    settings = DownstreamSettings(tasks=["reading", "boolq", "mine"])
    assert task_names(settings) == [*TASK_LISTS["reading"], "mine"]


def test_without_lm_eval_the_install_command_is_named(monkeypatch, tiny_model_folder, tmp_path):
    monkeypatch.setattr("safer_instruct.evaluation.downstream.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs lm_eval, which is not installed here: pip install "lm_eval\[hf\]"'):
        require_lm_eval()
    with pytest.raises(UserError, match="pip install"):
        run_evaluate(f"models.t.path={tiny_model_folder}", "downstream.tasks=[mmlu]", f"output={tmp_path}/out")


def test_a_task_that_fails_shows_lm_evals_last_lines(monkeypatch, tiny_model_folder, tmp_path):
    script = "print('a line'); raise SystemExit('no such task: toy')"
    monkeypatch.setattr("safer_instruct.evaluation.downstream._command", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setattr("safer_instruct.evaluation.steps.require_lm_eval", lambda: None)
    with pytest.raises(UserError, match=r"status 1; its last lines:\n  no such task: toy|a line"):
        run_evaluate(f"models.t.path={tiny_model_folder}", "downstream.tasks=[toy]", f"output={tmp_path}/out")


def test_values_out_of_range(tiny_model_folder, tmp_path):
    with pytest.raises(UserError) as raised:
        run_evaluate(
            f"models.t.path={tiny_model_folder}", "downstream.tasks=[x]", f"output={tmp_path}/out",
            "downstream.limit=0", "downstream.batch_size=0", "downstream.num_fewshot=-1",
            "downstream.include_path=none",
        )  # fmt: skip
    for part in ("limit=0", "batch_size=0", "num_fewshot=-1", "include_path=none"):
        assert f"downstream.{part}" in str(raised.value)


@pytest.mark.parametrize("results", [None, "{", "[]", "{}", '{"results": {"toy": 5}}'])
def test_results_of_lm_eval_that_cannot_be_read_are_said(tiny_model_folder, tmp_path, monkeypatch, results):
    with pytest.raises(UserError, match="lm_eval wrote no results that can be read"):
        run_fake_tasks(tiny_model_folder, tmp_path, monkeypatch, results)


def run_fake_tasks(model, folder, monkeypatch, results):
    """Run a task by a stand-in of lm_eval that writes these results."""

    def run(command, **_):
        output = Path(command[command.index("--output_path") + 1])
        output.mkdir(parents=True)
        if results is not None:
            (output / "results_1.json").write_text(results)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("safer_instruct.evaluation.downstream.subprocess.run", run)
    respondent = check_model("t", EvaluatedModelSettings(path=model, template="plain"))
    return run_tasks(respondent, folder, DownstreamSettings(tasks=["toy"]), model_folder=model, device="cpu")


def test_a_number_that_lm_eval_could_not_tell_is_none_and_damaged_results_are_named(
    tiny_model_folder, tmp_path, monkeypatch
):
    """Of one document there is no standard error; report.json takes no NaN."""
    results = '{"results": {"toy": {"acc,none": 0.5, "acc_stderr,none": NaN, "f1,none": NaN}}}'
    found = run_fake_tasks(tiny_model_folder, tmp_path, monkeypatch, results)
    assert found["tasks"] == {"toy": {"acc": {"value": 0.5, "stderr": None}}}
    assert run_fake_tasks(tiny_model_folder, tmp_path, monkeypatch, None) == found, "kept"
    next(tmp_path.glob("*.json")).write_text('{"tasks"')
    with pytest.raises(UserError, match=r"\.json cannot be read .*; delete it to have the tasks run again"):
        run_fake_tasks(tiny_model_folder, tmp_path, monkeypatch, results)
