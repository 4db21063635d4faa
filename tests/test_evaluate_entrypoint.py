"""evaluate.py as a user runs it: killed and typed again, on a tiny random model, judged by rules."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

import evaluate
from config.schema import compose_config, compose_configs
from config.settings import EvaluatedModelSettings, PromptSetSettings
from safer_instruct.experts.expert import RulesExpert
from tests import warm
from tests.evaluations import run_evaluate

ROOT = Path(__file__).resolve().parents[1]
NUM_PROMPTS = 24


def write_prompts(folder):
    """An unsafe set, and a benign one with references; word salad that no rule knows."""
    unsafe = [
        {
            "id": f"u{i}",
            "instruction": f"please do unsafe thing {i}",
            "label": "ab"[i % 2],
            "source": "si",
            "kind": "unsafe",
        }
        for i in range(NUM_PROMPTS)
    ]
    benign = [
        {"id": f"b{i}", "instruction": f"name fruit {i}", "kind": "benign", "reference": ["apple"]} for i in range(4)
    ]
    for name, rows in {"unsafe": unsafe, "benign": benign}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(model, folder, output, *, max_batch_tokens=1):
    """One row a batch unless asked otherwise, so that a kill meets the work half done."""
    return [
        f"models.base.path={model}",
        f"prompts.unsafe.path={folder}/unsafe.jsonl",
        f"prompts={{benign:{folder}/benign.jsonl}}",
        "expert=rules",
        f"output={output}",
        "generation.max_new_tokens=32",
        f"generation.max_batch_tokens={max_batch_tokens}",
        f"training_data=[{folder}/benign.jsonl]",
    ]


def start(args):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "disabled",
    }
    return warm.Popen([sys.executable, str(ROOT / "evaluate.py"), *args], env=environment)


def run_here(args):
    run_evaluate(*args)


def ledger_lines(output):
    return {path.name: path.read_text().splitlines() for path in sorted((output / "ledger").glob("*.jsonl"))}


@pytest.mark.slow
def test_killed_and_typed_again_equals_uninterrupted(tiny_model_folder, tmp_path, monkeypatch, capsys):
    write_prompts(tmp_path)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(arguments(tiny_model_folder, tmp_path, killed))
    deadline = time.monotonic() + 1500
    while time.monotonic() < deadline and process.poll() is None:
        lines = ledger_lines(killed) if killed.exists() else {}
        if any(len(content) > 5 for content in lines.values()):
            break
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (before,) = ledger_lines(killed).values()
    assert 5 < len(before) < NUM_PROMPTS
    assert not (killed / "report.json").exists()

    again = start(arguments(tiny_model_folder, tmp_path, killed, max_batch_tokens=100_000))  # changes no text
    out, err = again.communicate(timeout=1500)
    assert again.returncode == 0, err
    after = next(lines for name, lines in ledger_lines(killed).items() if name.startswith("generate-base"))
    assert after[: len(before) - 1] == before[:-1]  # the last line may have been torn
    ids = [json.loads(line)["id"] for line in after[1:]]
    assert len(ids) == len(set(ids)) == NUM_PROMPTS + 4

    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    run_here(
        [*arguments(tiny_model_folder, tmp_path, whole)[:-2], *arguments(tiny_model_folder, tmp_path, whole)[-1:]]
    )  # in two batches
    reports = [json.loads((folder / "report.json").read_text()) for folder in (killed, whole)]
    for report in reports:
        report.pop("run")
    assert reports[0] == reports[1]
    assert (killed / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    check_report(killed, out, err)


def check_report(folder, out, err):
    report = json.loads((folder / "report.json").read_text())
    base = report["models"]["base"]
    assert base["harmful_rate"]["n"] == NUM_PROMPTS
    assert base["benign_accuracy"]["n"] == 4
    assert base["by_source"].keys() == {"si", "benign"}  # the file's column; else the name of the set
    assert base["by_label"].keys() == {"a", "b", "(no label)"}
    assert report["overlap"][0]["prompt_ids"] == [f"benign/b{i}" for i in range(4)]
    run = report["run"]
    assert run["command"].startswith("python ")
    assert "models.base.path=" in run["command"]
    assert run["stages"][-1]["name"] == "evaluate"
    assert {"generate base", "judge", "total"} <= run["seconds"].keys()
    assert run["versions"].keys() >= {"python", "torch", "transformers"}
    assert len(report["prompts"]["unsafe"]["fingerprint"]) == 32
    assert "Harmful answers" in out
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in samples][:NUM_PROMPTS] == [f"u{i}" for i in range(NUM_PROMPTS)]
    for text in [row["output"].strip() for row in samples] + [row["instruction"] for row in samples]:
        assert len(text) < 4 or text not in out + err  # no text of a model or a prompt on the console
    assert "4 prompts also occur in" in err
    assert (folder / "report.md").read_text().startswith("# Evaluation")
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")


@pytest.fixture
def counted_run(tiny_model_folder, tmp_path, monkeypatch):
    """Runs evaluate in this process and counts models loaded and outputs judged."""
    counts, reported = {}, []
    import safer_instruct.generation.backends as backends

    load, judge = backends.load_causal_lm, RulesExpert.judge

    def counted_load(*args, **kwargs):
        counts["loaded"] += 1
        return load(*args, **kwargs)

    def counted_judge(self, items):
        counts["judged"] += len(items)
        return judge(self, items)

    monkeypatch.setattr(backends, "load_causal_lm", counted_load)
    monkeypatch.setattr(RulesExpert, "judge", counted_judge)

    # The page takes longest, and is tested elsewhere.
    def note(_config, evaluation, *_rest):
        reported[:] = evaluation.respondents

    monkeypatch.setattr(evaluate, "write_report", note)
    write_prompts(tmp_path)

    def run(*more):
        counts.update(loaded=0, judged=0)
        base = arguments(tiny_model_folder, tmp_path, tmp_path / "out")
        keys = {argument.split("=")[0] for argument in more}
        run_here([*(argument for argument in base if argument.split("=")[0] not in keys), *more])
        return counts["loaded"], counts["judged"], reported

    return run


def test_nothing_is_computed_twice_and_changes_cost_only_themselves(counted_run, tmp_path, tiny_model_folder):
    fast = ["generation.max_batch_tokens=100000", "generation.max_new_tokens=4"]
    assert counted_run(*fast) == (1, NUM_PROMPTS + 4, ["base"])
    assert counted_run(*fast) == (0, 0, ["base"])
    # a batch size changes no text, and neither does a seed where nothing is drawn
    assert counted_run("generation.max_batch_tokens=500", "generation.max_new_tokens=4", "generation.seed=3")[:2] == (
        0,
        0,
    )
    # an edited prompt is asked again, under its old id
    path = tmp_path / "unsafe.jsonl"
    path.write_text(path.read_text().replace("unsafe thing 7", "unsafe thing seven"))
    assert counted_run(*fast)[:2] == (1, 1)
    # the same weights under a second name say the same: generated for it, judged once
    assert counted_run(*fast, f"models.twin.path={tiny_model_folder}") == (1, 0, ["base", "twin"])
    # another limit is another answer
    assert counted_run("generation.max_batch_tokens=100000", "generation.max_new_tokens=5")[0] == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("models.base.path=runs/a", {"base": {"path": "runs/a"}}),
        ("+models.base.path=runs/a", {"base": {"path": "runs/a"}}),
        ("models.base=runs/a", {"base": {"path": "runs/a"}}),
        ("models={base:runs/a,dpo:runs/b}", {"base": {"path": "runs/a"}, "dpo": {"path": "runs/b"}}),
        ("models={a:{path:x,dtype:bfloat16}}", {"a": {"path": "x", "dtype": "bfloat16"}}),
        ('models.a.path="it\'s, here"', {"a": {"path": "it's, here"}}),
        ("models.v1.5.path=x", {"v1.5": {"path": "x"}}),
        ("prompts.p.max_rows=5", {"p": {"max_rows": 5}}),
        ("prompts.p.kind=null", {"p": {"kind": None}}),
        ("prompts=published", {"published": {"kind": "unsafe", "source_column": "label"}}),
    ],
)
def test_every_way_to_name_models_means_the_same(given, expected):
    config = compose_config("evaluate", [given])
    kind, found = (PromptSetSettings, config.prompts) if "prompts" in given else (EvaluatedModelSettings, config.models)
    assert found == {name: kind(**entry) for name, entry in expected.items()}


def test_models_of_a_sweep():
    points = compose_configs("evaluate", ["models.a.path=x,y"], multirun=True)
    assert [config.models["a"].path for config in points] == ["x", "y"]


def test_names_and_paths_survive_hydra(tmp_path):
    awkward = "runs/lr=1e-5, it's {odd} $x"
    overrides = [
        "expert=rules",
        f"output={tmp_path}",
        f'models.a.path="{awkward}"',
        "prompts={p:x.csv}",
    ]
    overrides += ["models.b=y", "models.a.dtype=bfloat16"]
    config = compose_config("evaluate", overrides)
    assert {name: model.path for name, model in config.models.items()} == {"a": awkward, "b": "y"}
    assert config.models["a"].dtype == "bfloat16"
    assert config.prompts["p"].path == "x.csv"
