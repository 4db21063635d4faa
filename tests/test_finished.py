"""`compare=[...]`: finished evaluations and training runs in one report, and what cannot share a table."""

import json
import math
import shutil
from functools import reduce

import pytest
import yaml

from config.errors import UserError
from safer_instruct.report.evaluations import find_finished
from safer_instruct.report.training_runs import find_training_overlap, read_training_run
from tests.evaluations import run_evaluate

PROMPTS = [{"id": f"u{i}", "instruction": f"ask {i}", "label": "ab"[i % 2], "kind": "unsafe"} for i in range(6)]


def evaluated(folder, column, texts, prompts=PROMPTS):
    """An output of evaluate.py for one column of given answers, judged by the quick start's rules."""
    file = folder.parent / f"{folder.name}.jsonl"
    rows = ({**prompt, column: text} for prompt, text in zip(prompts, texts, strict=False))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_evaluate(f"prompts.p.path={file}", "responses=csv", "expert=rules", f"output={folder}", "samples_per_set=2")
    return folder


REFUSAL = "I can't help with that."


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    root = tmp_path_factory.mktemp("reports")
    a = evaluated(root / "a", "model", ["Sure."] * 6)
    b = evaluated(root / "b", "model", [REFUSAL] * 5 + ["Sure."])
    other = evaluated(root / "other", "third", ["Sure."] * 5, PROMPTS[:5])
    return a, b, other


def trained(folder, beta, losses, **more):
    folder.mkdir(parents=True)
    config = {"exp_name": folder.name, "seed": 0, "loss": {"name": "dpo", "beta": beta}, "datasets": {}, **more}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        json.dumps({"counters/examples": 8 * i, "loss/eval": loss, "loss/train": loss}) for i, loss in enumerate(losses)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"counters/exa')  # killed while it wrote
    return folder


@pytest.fixture
def sweep(tmp_path):
    for beta, losses in {"0.1": [0.7, 0.5], "0.5": [0.7, 0.2], "1.0": [0.7, 0.9]}.items():
        trained(tmp_path / "sweep" / f"loss.beta={beta}", float(beta), losses)
    return tmp_path / "sweep"


def test_two_evaluations_become_one_report_without_any_work(reports, tmp_path, monkeypatch):
    monkeypatch.setattr("safer_instruct.experts.expert.RulesExpert.judge", lambda *_: pytest.fail("judged again"))
    a, b, _ = reports
    run_evaluate(f"compare=[{a},{b}]", f"output={tmp_path}/out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    one, two = (json.loads((folder / "report.json").read_text())["models"]["model"] for folder in (a, b))
    assert report["models"] == {"a: model": one, "b: model": two}  # the same names: the folder tells them apart
    (refusals,) = [entry for entry in report["comparisons"] if entry["metric"] == "refusal_rate"]
    assert (refusals["first"], refusals["second"], refusals["only_second"], refusals["n"]) == (
        "a: model",
        "b: model",
        5,
        6,
    )
    samples = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 12
    assert "Models compared on the same prompts" in (tmp_path / "out" / "report.html").read_text()


def test_models_with_different_prompt_sets_cannot_share_a_table(reports, tmp_path):
    a, _, other = reports
    with pytest.raises(UserError, match=r"models with different prompt sets.*a has p \(n=6, .*other has p \(n=5, "):
        run_evaluate(f"compare=[{a},{other}]", f"output={tmp_path}/out")


def test_a_sweep_becomes_one_table_sorted_by_a_metric(sweep, tmp_path):
    run_evaluate(f"compare=[{sweep}]", "sort_by=loss/eval", f"output={tmp_path}/out")
    runs = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]
    assert [one["name"] for one in runs["runs"]] == ["loss.beta=0.5", "loss.beta=0.1", "loss.beta=1.0"]
    assert runs["settings"] == ["loss.beta"]  # what differs, and not the names
    assert runs["metrics"][0] == "loss/eval"
    assert [one["metrics"]["loss/eval"] for one in runs["runs"]] == [0.2, 0.5, 0.9]
    page, text = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert "Held-out loss, over examples seen. loss.beta=0.5 from 0.7 to 0.2; loss.beta=0.1 from 0.7 to 0.5" in page
    assert "| loss.beta=0.5 | 0.5 | 0.2 | 0.2 | 8 |" in text
    run_evaluate(f"compare=[{sweep}]", "sort_by=-loss/eval", f"output={tmp_path}/down")
    runs = json.loads((tmp_path / "down" / "report.json").read_text())["runs"]
    assert [one["metrics"]["loss/eval"] for one in runs["runs"]] == [0.9, 0.5, 0.2]


def test_runs_and_evaluations_together(reports, sweep, tmp_path):
    run_evaluate(f"compare=[{reports[0]},'{sweep}/loss.beta=0.1']", f"output={tmp_path}/out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["models"]) == ["model"]
    assert [one["name"] for one in report["runs"]["runs"]] == ["loss.beta=0.1"]


def test_mistakes_of_compare(reports, sweep, tmp_path):
    def message(*arguments):
        with pytest.raises(UserError) as raised:
            run_evaluate(*arguments, f"output={tmp_path}/out")
        return str(raised.value)

    assert f"there is no folder {tmp_path}/none" in message(f"compare=[{tmp_path}/none]")
    (tmp_path / "empty").mkdir()
    assert "holds no run (config.yaml and metrics.jsonl)" in message(f"compare=[{tmp_path}/empty]")
    text = message(f"compare=[{sweep}]", "sort_by=loss/evil")
    assert "sort_by=loss/evil: no run has this metric; they have counters/examples, loss/eval, loss/train" in text
    broken = trained(tmp_path / "broken", 0.1, [])
    (broken / "metrics.jsonl").write_text("")
    assert "a run without metrics yet" in message(f"compare=[{broken}]")
    (broken / "metrics.jsonl").write_text('no json\n{"loss/eval": 1}\n')
    assert "metrics.jsonl:1: not a JSON object on a line of its own" in message(f"compare=[{broken}]")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "report.json").write_text("{")
    (torn / "samples.jsonl").write_text("")
    assert "cannot be read (JSONDecodeError); rerun its command" in message(f"compare=[{torn}]")


def test_names_take_as_many_folders_as_they_need(tmp_path):
    for place in ("x/run", "y/run", "z/alone"):
        trained(tmp_path / place, 0.1, [1.0])
    found, _ = find_finished([str(tmp_path / place) for place in ("x/run", "y/run", "x/run")])
    assert list(found) == ["x/run", "y/run"]
    assert list(find_finished([str(tmp_path / "z/alone")])[0]) == ["alone"]
    expected = {"counters/examples": 0.0, "loss/eval": 1.0, "loss/train": 1.0}
    assert read_training_run("r", tmp_path / "x/run").metrics == expected


def test_prompts_that_the_evaluated_run_was_trained_on(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [
        {"instruction": text, "chosen": "no", "rejected": "yes", "label": "x"} for text in ("Seen  One", "left out")
    ]
    (data / "si.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "test_set.csv").write_text("instruction,label\nleft out,si\n")
    si = {"path": str(data / "si.jsonl"), "schema": "si", "eval_path": None, "eval_fraction": 0.0, "exclude": None}
    folder = trained(tmp_path / "run", 0.1, [1.0], datasets={"si": si})
    asked = {text: [f"s/{text}"] for text in ("seen one", "left out", "never seen")}
    (found,) = find_training_overlap(str(folder), asked)
    assert found.prompt_ids == ("s/seen one",)  # train.py leaves out what the test set beside the data asks
    assert found.num_rows == 2
    checkpoint = folder / "checkpoints" / "step-8" / "model"
    checkpoint.mkdir(parents=True)
    assert find_training_overlap(str(checkpoint), asked) == [found]
    held = {**si, "eval_fraction": 0.999999999}
    (held_found,) = find_training_overlap(str(trained(tmp_path / "held", 0.1, [1.0], datasets={"si": held})), asked)
    assert held_found.prompt_ids == ()  # it was held out, not trained on
    gone = {**si, "path": str(tmp_path / "gone.jsonl")}
    assert find_training_overlap(str(trained(tmp_path / "gone", 0.1, [1.0], datasets={"si": gone})), asked) == []
    assert find_training_overlap("quickstart/model", asked) == []


@pytest.mark.parametrize(("sort_by", "order"), [("loss/eval", [0.2, 0.5, 0.9]), ("-loss/eval", [0.9, 0.5, 0.2])])
def test_a_run_whose_metric_is_not_a_number_comes_last(sweep, tmp_path, sort_by, order):
    trained(sweep / "loss.beta=0.3", 0.3, [0.7, math.nan])
    run_evaluate(f"compare=[{sweep}]", f"sort_by={sort_by}", f"output={tmp_path}/out")
    runs = json.loads((tmp_path / "out" / "report.json").read_text())["runs"]["runs"]
    assert [one["metrics"]["loss/eval"] for one in runs] == [*order, None]


def test_a_folder_that_is_named_twice_is_compared_once(reports, tmp_path):
    a, b, _ = reports
    (tmp_path / "link").symlink_to(a)
    run_evaluate(f"compare=[{a},{tmp_path}/link,{b},{a}/.]", f"output={tmp_path}/out")
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())["models"]) == ["a: model", "b: model"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("run",), ...), (("run", "judge"), ...), (("warnings",), "x"), (("models", "model"), 5),
        (("models", "model", "path"), ...), (("run", "generation", "temperature"), "hot"),
        (("models", "model", "unanswered"), 5), (("prompts", "p", "kinds"), ...),
    ],
)  # fmt: skip
def test_a_report_that_a_hand_has_changed_is_named_with_the_place(reports, tmp_path, place, value):
    """Without its checksums: an earlier version wrote none, and who edits a report may delete them."""
    folder = tmp_path / "edited"
    shutil.copytree(reports[0], folder)
    next(folder.glob("checksums*")).unlink()
    report = json.loads((folder / "report.json").read_text())
    inner = reduce(dict.__getitem__, place[:-1], report)
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    (folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match=rf"holds no report of evaluate.py \({'.'.join(place)}"):
        run_evaluate(f"compare=[{folder},{reports[1]}]", f"output={tmp_path}/out")


@pytest.mark.parametrize(
    ("key", "value"), [("label", None), ("id", 5), ("outcome", "fine"), ("output", 5), ("set", [])]
)
def test_a_sample_that_a_hand_has_changed_is_named_with_its_field(reports, tmp_path, key, value):
    folder = tmp_path / "edited"
    shutil.copytree(reports[0], folder)
    next(folder.glob("checksums*")).unlink()
    first, *others = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join([json.dumps(json.loads(first) | {key: value}) + "\n", *others]))
    with pytest.raises(UserError, match=rf"holds no report of evaluate.py \({key}"):
        run_evaluate(f"compare=[{folder}]", f"output={tmp_path}/out")
