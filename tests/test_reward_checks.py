"""Implicit rewards on held-out pairs: margins against a plain forward pass, accuracy and calibration by hand."""

import json
import math

import pytest
import torch
import yaml

from config.errors import UserError
from safer_instruct.measures.reward_checks import check_rewards
from safer_instruct.text.prompts import render_alpaca
from tests.conftest import tiny_llama
from tests.evaluations import run_evaluate

PAIRS = [
    {"instruction": f"please {thing}", "chosen": f"no, not {thing}", "rejected": f"sure, {thing} it is", "label": label}
    for thing, label in [("steal", "theft"), ("shout", "insult"), ("jump", "dare"), ("peek", "theft"), ("run", "dare")]
]


def test_accuracy_margin_and_calibration_by_hand():
    found = check_rewards([2.0, -1.0, 0.0, 1.0], ["a", "a", "b", ""])
    assert (found["n"], found["ties"]) == (4, 1)
    assert found["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["accuracy"]["n"] == 3
    assert found["margin"]["mean"] == 0.5
    assert found["by_label"].keys() == {"(no label)", "a", "b"}
    assert found["by_label"]["a"]["accuracy"]["value"] == 0.5
    # confidences: sigmoid(2) right, sigmoid(1) once right and once wrong, 0.5 half right
    sure, fair = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    assert [row["n"] for row in found["bins"]] == [1, 2, 1]
    expected = (abs(0.5 - 0.5) + 2 * abs(fair - 0.5) + abs(sure - 1)) / 4
    assert found["calibration_error"] == pytest.approx(expected)


def test_a_model_that_knows_how_sure_it_may_be_is_calibrated():
    random = torch.Generator().manual_seed(0)
    size = torch.rand(20_000, generator=random, dtype=torch.float64) * 4
    right = torch.rand(20_000, generator=random, dtype=torch.float64) < size.sigmoid()
    margins = torch.where(right, size, -size)
    honest = check_rewards(margins.tolist(), [""] * 20_000)["calibration_error"]
    boastful = check_rewards((3 * margins).tolist(), [""] * 20_000)["calibration_error"]
    assert honest < 0.02  # 20,000 pairs in ten bins: a standard error of 0.01 each
    assert boastful > 0.1


def logp(model, tokenizer, prompt, response):
    """The sum of log-probabilities of response and EOS, by transformers' own forward pass."""
    head = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]
    assert whole[: len(head)] == head
    with torch.no_grad():
        logps = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(logps[i - 1, whole[i]].item() for i in range(len(head), len(whole)))


@pytest.fixture
def folders(tmp_path, tokenizer):
    models = {"reference": tiny_llama(len(tokenizer)), "dpo": tiny_llama(len(tokenizer), seed=1)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return models


def run(tmp_path, *more):
    arguments = [
        f"models.sft.path={tmp_path}/reference", f"models.dpo.path={tmp_path}/dpo",
        f"rewards.path={tmp_path}/pairs.jsonl",
        "rewards.reference=sft", "rewards.beta=0.5", "rewards.batch_size=2", f"local_dirs=[{tmp_path}/cache]",
        f"output={tmp_path}/out",
    ]  # fmt: skip
    keys = {argument.split("=")[0] for argument in more}
    chosen = [*(argument for argument in arguments if argument.split("=")[0] not in keys), *more]
    run_evaluate(*chosen)
    return json.loads((tmp_path / "out" / "report.json").read_text())


def test_margins_are_those_of_a_plain_forward_pass(folders, tmp_path, tokenizer):
    part = run(tmp_path)["rewards"]
    assert (part["reference"], part["beta"], list(part["models"])) == ("sft", 0.5, ["dpo"])
    margins = []
    for row in PAIRS:
        prompt = render_alpaca(row["instruction"]).text
        ratio = {
            text: logp(folders["dpo"], tokenizer, prompt, row[text])
            - logp(folders["reference"], tokenizer, prompt, row[text])
            for text in ("chosen", "rejected")
        }
        margins.append(0.5 * (ratio["chosen"] - ratio["rejected"]))
    found = part["models"]["dpo"]
    assert found["margin"]["mean"] == pytest.approx(sum(margins) / 5, abs=1e-4)
    assert found["accuracy"]["value"] == pytest.approx(sum(margin > 0 for margin in margins) / 5)
    theft = [margins[0], margins[3]]
    assert found["by_label"]["theft"]["margin"]["mean"] == pytest.approx(sum(theft) / 2, abs=1e-4)
    assert found["by_label"]["theft"]["n"] == 2
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Implicit rewards on held-out pairs, against sft" in text
    assert "please steal" not in text + (tmp_path / "out" / "report.html").read_text()


def test_labels_are_those_of_the_rows_whatever_their_ids(folders, tmp_path):
    """Two rows of one id with other texts, one of which is dropped; two rows of equal texts with other labels."""
    rows = [
        {"id": "x", "instruction": "a </s> b", "chosen": "no", "rejected": "yes", "label": "dropped"},  # special token
        {"id": "x", "instruction": "one", "chosen": "no", "rejected": "yes", "label": "first"},
        {"id": "x", "instruction": "two", "chosen": "no no", "rejected": "yes", "label": "second"},
        {"id": "y", "instruction": "two", "chosen": "no no", "rejected": "yes", "label": "third"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_label = run(tmp_path)["rewards"]["models"]["dpo"]["by_label"]
    assert {label: found["n"] for label, found in by_label.items()} == {"first": 1, "second": 1, "third": 1}
    assert by_label["second"]["margin"]["mean"] == by_label["third"]["margin"]["mean"]
    assert by_label["first"]["margin"]["mean"] != by_label["second"]["margin"]["mean"]


def test_a_model_against_itself_is_tied_everywhere(folders, tmp_path):
    found = run(tmp_path, f"models.dpo.path={tmp_path}/reference")["rewards"]["models"]["dpo"]
    assert (found["ties"], found["accuracy"]["n"], found["calibration_error"]) == (5, 0, 0.0)
    assert found["margin"]["mean"] == 0.0


def test_mistakes(folders, tmp_path):
    def message(*more):
        with pytest.raises(UserError) as raised:
            run(tmp_path, *more)
        return str(raised.value)

    assert "rewards.reference=nobody: no such choice" in message("rewards.reference=nobody")
    assert "rewards.reference is not set" in message("rewards.reference=null")
    assert "rewards.beta=0" in message("rewards.beta=0")
    assert "rewards.max_prompt_length=600: must be smaller" in message("rewards.max_prompt_length=600")
    assert "read the pairs as different tokens" in message("models.dpo.template=plain")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"instruction": "x", "chosen": "y", "rejected": ""}) + "\n")
    assert "no usable row" in message()


def as_run(tmp_path, name, **loss):
    """Makes a model folder part of a run of train.py."""
    config = {"loss": {"name": "dpo", **loss}, "datasets": {}}
    (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))


def test_beta_is_the_one_of_the_run(folders, tmp_path):
    typed = run(tmp_path)["rewards"]
    as_run(tmp_path, "dpo", beta=0.25, average_logps=False)
    of_run = run(tmp_path, "rewards.beta=null")["rewards"]
    assert (of_run["beta"], of_run["models"]["dpo"]["beta"]) == (0.25, 0.25)
    assert of_run["models"]["dpo"]["margin"]["mean"] == pytest.approx(typed["models"]["dpo"]["margin"]["mean"] / 2)
    assert run(tmp_path, "rewards.beta=0.25")["rewards"] == of_run  # the same, typed: no contradiction


@pytest.mark.parametrize(
    ("name", "average_logps", "reference_free"),
    [("simpo", True, True), ("dpo_norm", True, False), ("cpo", False, True), ("bco_pair", False, False)],
)
def test_a_loss_without_the_keys_has_its_own_scale(folders, tmp_path, name, average_logps, reference_free):
    (tmp_path / "dpo" / "config.yaml").write_text(yaml.safe_dump({"loss": {"name": name, "beta": 0.5}, "datasets": {}}))
    one = run(tmp_path, "rewards.beta=null")["rewards"]["models"]["dpo"]
    assert (one["average_logps"], one["reference_free"]) == (average_logps, reference_free)


def test_each_model_has_the_beta_of_its_run(folders, tmp_path):
    as_run(tmp_path, "dpo", beta=0.25)
    as_run(tmp_path, "reference", beta=1.0)  # the same weights as the reference, and a run of its own
    part = run(tmp_path, "rewards.beta=null", f"models.twin.path={tmp_path}/reference")["rewards"]
    assert part["beta"] is None
    assert {name: one["beta"] for name, one in part["models"].items()} == {"dpo": 0.25, "twin": 1.0}
    assert "beta = 0.25 (dpo), 1 (twin)." in (tmp_path / "out" / "report.md").read_text()


def test_averaged_log_probabilities_of_the_run(folders, tmp_path, tokenizer):
    as_run(tmp_path, "dpo", beta=0.5, average_logps=True)
    margins = []
    for row in PAIRS:
        prompt = render_alpaca(row["instruction"]).text
        means = {}
        for text in ("chosen", "rejected"):
            num_tokens = len(tokenizer(prompt + row[text])["input_ids"]) + 1 - len(tokenizer(prompt)["input_ids"])
            own, other = (logp(folders[name], tokenizer, prompt, row[text]) for name in ("dpo", "reference"))
            means[text] = (own - other) / num_tokens
        margins.append(0.5 * (means["chosen"] - means["rejected"]))
    found = run(tmp_path, "rewards.beta=null")["rewards"]["models"]["dpo"]
    assert found["margin"]["mean"] == pytest.approx(sum(margins) / 5, abs=1e-5)


def test_a_value_that_contradicts_the_run_names_both(folders, tmp_path):
    as_run(tmp_path, "dpo", beta=0.25, average_logps=True)
    with pytest.raises(UserError) as raised:
        run(tmp_path, "rewards.beta=0.1", "rewards.average_logps=false")
    message = str(raised.value)
    assert f"rewards.beta=0.1: models.dpo.path={tmp_path}/dpo was trained with loss.beta=0.25" in message
    assert "rewards.average_logps=False: " in message
    assert "loss.average_logps=True" in message
    assert "leave rewards.beta out" in message


def test_a_model_without_a_run_needs_beta(folders, tmp_path):
    with pytest.raises(
        UserError, match=r"rewards\.beta is not set, and models\.dpo\.path=.* write rewards\.beta=NUMBER"
    ):
        run(tmp_path, "rewards.beta=null")


def test_pairs_that_a_model_was_trained_on_are_not_called_held_out(folders, tmp_path):
    data = {"si": {"path": str(tmp_path / "pairs.jsonl"), "schema": "si", "eval_fraction": 0.0}}
    (tmp_path / "dpo" / "config.yaml").write_text(yaml.safe_dump({"loss": {"beta": 0.5}, "datasets": data}))
    report = run(tmp_path)
    assert report["rewards"]["trained_on"] == {"sft": 0, "dpo": 5}
    assert "dpo was trained on the instructions of 5 of the pairs in" in " ".join(report["warnings"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Implicit rewards on pairs that were trained on, against sft" in text
    assert "held-out pairs" not in text
