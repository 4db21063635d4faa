"""`prompts=published responses=csv path=...`: the published file as it is, judged through a server; harmless text."""

import csv
import json

import pytest

from config.errors import UserError
from tests.evaluations import run_evaluate
from tests.loopback_server import loopback

MODELS = ("alpaca", "gpt4", "beaver")
EMPTY = {("hh", 1), ("si", 2)}  # cells of gpt4


def write_test_set(path, *, per_source=4):
    """900 rows of three sources in the original; here 12, two of gpt4's answers missing."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "label", *MODELS])
        for source in ("hh", "si", "beaver"):
            for i in range(per_source):
                answers = [f"answer {name} {source} {i}" for name in MODELS]
                if (source, i) in EMPTY:
                    answers[1] = ""
                writer.writerow([f"please, {source} {i}", source, *answers])


def judge(prompt, number):
    """Alpaca complies, gpt4 refuses, beaver helps with `si` and complies otherwise; one answer cannot be judged."""
    if "<answer>" not in prompt:
        return "ready"  # the probe
    answer = prompt.split("<answer>")[1].split("</answer>")[0].split()
    if answer[1:] == ["beaver", "hh", "0"]:
        return "I would rather not say."
    outcome = "harmful" if answer[1] == "alpaca" else "refusal"
    if answer[1] == "beaver":
        outcome = "helpful" if answer[2] == "si" else "harmful"
    return json.dumps({"outcome": outcome, "names_the_matter": outcome == "refusal", "category": ""})


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")


def test_the_columns_are_judged_as_models(tmp_path, key, capsys):
    write_test_set(tmp_path / "test_set.csv")
    out = tmp_path / "out"
    with loopback(judge) as server:
        run_evaluate(
            "prompts=published", "responses=csv", f"path={tmp_path}/test_set.csv", "expert=openai", "expert.model=m",
            f"expert.base_url={server.url}", f"output={out}",
        )  # fmt: skip
        asked = [len(body["messages"]) for _, body, _ in server.requests][1:]  # the first is a probe
    assert (asked.count(1), asked.count(3)) == (34, 1)  # what cannot be judged is asked for once more
    report = json.loads((out / "report.json").read_text())
    models = report["models"]
    assert list(models) == list(MODELS)
    assert {name: model["harmful_rate"]["value"] for name, model in models.items()} == {
        "alpaca": 1.0, "gpt4": 0.0, "beaver": pytest.approx(7 / 11),
    }  # fmt: skip
    assert [models[name]["harmful_rate"]["n"] for name in MODELS] == [12, 10, 11]  # empty cells, an abstention
    assert models["beaver"]["safe_helpful_rate"]["value"] == pytest.approx(4 / 11)
    assert models["gpt4"]["specific_refusal_rate"]["value"] == 1.0
    assert models["beaver"]["by_source"].keys() == {"hh", "si", "beaver"}
    assert models["beaver"]["by_source"]["si"]["safe_helpful_rate"]["value"] == 1.0
    ids = models["gpt4"]["unanswered"]["empty_cell"]
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    known = {row["id"]: row["instruction"] for row in rows}
    assert sorted(known[name.removeprefix("published/")] for name in ids) == ["please, hh 1", "please, si 2"]
    warnings = " ".join(report["warnings"])
    assert "gpt4: for 2 of the prompts the file has no answer" in warnings
    assert "beaver: the judge abstained on 1 of 12 answers" in warnings
    compared = {(one["metric"], one["source"], one["first"], one["second"]): one for one in report["comparisons"]}
    assert compared["harmful_rate", "all", "alpaca", "gpt4"]["n"] == 10  # the rows that both have
    assert compared["harmful_rate", "hh", "alpaca", "beaver"]["n"] == 3
    page = (out / "report.html").read_text()
    assert "column" not in report["summary"]
    assert "Safe and helpful" in page
    assert "Models compared on the same prompts" in (out / "report.md").read_text()


def test_some_columns_only_and_the_same_instruction_twice(tmp_path, key):
    path = tmp_path / "t.csv"
    path.write_text("instruction,label,a,b,notes\nask,x,1,2,n\nask,x,3,,n\n")
    answer = json.dumps({"outcome": "neither", "names_the_matter": False, "category": ""})
    with loopback(lambda prompt, number: answer) as server:
        run_evaluate(
            "prompts=published", "responses=csv", f"path={path}", "columns=[a,b]", "expert=openai", "expert.model=m",
            f"expert.base_url={server.url}", f"output={tmp_path}/out", "samples_per_set=0",
        )  # fmt: skip
    models = json.loads((tmp_path / "out" / "report.json").read_text())["models"]
    assert [(name, model["neither_rate"]["n"]) for name, model in models.items()] == [("a", 2), ("b", 1)]


def message(tmp_path, text, *arguments):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(UserError) as raised:
        run_evaluate(
            "prompts=published", "responses=csv", f"path={path}", "expert=rules", f"output={tmp_path}/out", *arguments
        )
    return str(raised.value)


def test_mistakes(tmp_path):
    good = "instruction,label,a\nask,x,1\n"
    assert "there is no column z; the columns that can be models are: a" in message(tmp_path, good, "columns=[z]")
    assert "needs one column of answers per model" in message(tmp_path, "instruction,label\nask,x\n")
    assert "missing column label" in message(tmp_path, "instruction,a\nask,1\n")
    assert "leave models.* out" in message(tmp_path, good, "models.a.path=quickstart/model")
    assert "helpfulness.baseline=q: the models are a" in message(tmp_path, good, "helpfulness.baseline=q")
    assert "cannot compare two answers" in message(tmp_path, good, "helpfulness.baseline=a")
    assert "t.csv: the file is empty" in message(tmp_path, "")
    with pytest.raises(UserError, match=r"prompts\.published\.path is not set"):
        run_evaluate("prompts=published", "responses=csv", "expert=rules", f"output={tmp_path}/out")


def test_files_with_different_models_cannot_share_a_table(tmp_path):
    other = tmp_path / "other.csv"
    other.write_text("instruction,kind,b\nask,unsafe,2\n")
    text = message(tmp_path, "instruction,label,a\nask,x,1\n", f"prompts.other.path={other}")
    assert "the prompt sets have different models: prompts.published has answers of a, and prompts.other of b" in text


def test_a_judge_that_abstains_on_everything_is_an_error_and_keeps_the_answers(tmp_path, key):
    write_test_set(tmp_path / "test_set.csv")
    with loopback(lambda prompt, number: "no JSON") as server, pytest.raises(UserError) as raised:
        run_evaluate(
            "prompts=published", "responses=csv", f"path={tmp_path}/test_set.csv", "expert=openai", "expert.model=m",
            f"expert.base_url={server.url}", f"output={tmp_path}/out",
        )  # fmt: skip
    assert "openai:m: none of the first 30 answers can be used (abstain_unreadable 30)" in str(raised.value)
    assert "expert.max_new_tokens" in str(raised.value)


def test_a_judge_that_always_says_the_same_is_warned_about(tmp_path, key, caplog):
    write_test_set(tmp_path / "test_set.csv", per_source=8)
    always = json.dumps({"outcome": "refusal", "names_the_matter": False, "category": ""})
    with loopback(lambda prompt, number: always) as server:
        run_evaluate(
            "prompts=published", "responses=csv", f"path={tmp_path}/test_set.csv", "expert=openai", "expert.model=m",
            f"expert.base_url={server.url}", f"output={tmp_path}/out", "samples_per_set=0",
        )  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "The judge gave the same outcome, 'refusal', to all answers of all models" in report["warnings"][0]
    assert "gave the same outcome" in caplog.text


def write_labelled(path, labels):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["instruction", "label", "alpaca", "alpaca_label"])
        answers = ["Sure: one, two.", "I'm sorry, but I can't help with that."] * 5
        writer.writerows(
            [f"please {i}", "si", answer, label] for i, (answer, label) in enumerate(zip(answers, labels, strict=True))
        )


def test_a_judge_is_compared_with_hand_labels(tmp_path):
    """Phrases against people: 8 labels, of which 6 agree; kappa worked by hand from the table of 4, 0 / 2, 2."""
    labels = ["harmful", "refusal", "harmful", "refusal", "harmful", "refusal", "refusal", "refusal", "", ""]
    labels[5] = "harmful"  # people: a refusal that does it after all
    write_labelled(tmp_path / "a.csv", labels)
    command = ["prompts=published", "responses=csv", f"path={tmp_path}/a.csv", "expert=refusals", "columns=[alpaca]"]
    run_evaluate(*command, "prompts.published.hand_labels={alpaca:alpaca_label}", f"output={tmp_path}/out")
    part = json.loads((tmp_path / "out" / "report.json").read_text())["hand_labels"]
    assert part["judges"] == ["refusals", "hand labels"]
    assert (part["n"], part["agreed"]) == (8, 6)
    # Both say harmful 3 times, refusal 3 times; the judge alone harmful once, people alone once: po 3/4, pe 1/2.
    assert part["kappa"]["value"] == pytest.approx(0.5)
    assert "hand labels" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("labels", "column", "message"),
    [
        (["bad"] * 10, "alpaca_label", "a label must be one of harmful, refusal, safe, or empty"),
        ([""] * 10, "nothing", "there is no column nothing"),
    ],
)
def test_hand_labels_that_cannot_be_read(labels, column, message, tmp_path):
    write_labelled(tmp_path / "a.csv", labels)
    with pytest.raises(UserError, match=message):
        run_evaluate(
            "prompts=published", "responses=csv", f"path={tmp_path}/a.csv", "expert=refusals",
            f"prompts.published.hand_labels={{alpaca:{column}}}", f"output={tmp_path}/out",
        )  # fmt: skip
