"""The moving average of the weights, and a reference that the policy renews: against loops over plain weights."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from config.settings import (
    LOSSES,
    CheckpointSettings,
    DPOSettings,
    EMASettings,
    LoraSettings,
    ReferenceSettings,
    TrainerSettings,
)
from tests.ranks import run_ranks
from tests.test_errors_loss import faults
from tests.tiny_models import tiny_model
from tests.tiny_runs import random_store, tiny_settings, tiny_trainer, train_loader
from trainers.distributed.following import FollowingWeights
from trainers.distributed.launch import launch
from trainers.run.run_dir import RunDir
from trainers.trainer import Trainer

KINDS = {
    "ema": {"ema": EMASettings(decay=0.8)},
    "ema beside": {"ema": EMASettings(decay=0.8, save=False)},
    "renewed": {"reference": ReferenceSettings(refresh_examples=10)},
    "bco": {"loss": LOSSES["bco_pair"](), "reference": ReferenceSettings(refresh_examples=8)},
    "both": {"ema": EMASettings(decay=0.8), "reference": ReferenceSettings(refresh_examples=10, refresh_alpha=0.6)},
}


def settings_of(kind: str, processes: int = 1, **changes):
    """Two epochs of 22 rows in batches of 4, two micro-batches each: renewals fall into epochs and across."""
    trainer = TrainerSettings(name="FSDPTrainer" if processes > 1 else "BasicTrainer", num_processes=processes)
    common = {"n_epochs": 2, "gradient_accumulation_steps": 2, "optimizer": "AdamW", "eval_every": 12}
    return tiny_settings(**common, trainer=trainer, **KINDS[kind], **changes)


def train(layout, folder: Path, name: str, settings) -> None:
    opened = layout.main_only(lambda: RunDir.open(folder / name, config=asdict(settings), manifest={}))
    with opened or RunDir(folder / name, None) as run:
        tiny_trainer(folder, layout, run, settings).train()


def start(folder: Path, name: str, settings) -> Path:
    if settings.trainer.num_processes == 1:
        launch(lambda layout: train(layout, folder, name, settings), settings)
    else:
        run_ranks(train, settings.trainer.num_processes, settings, folder, name, settings)
    return folder / name


def rows(run: Path, *names: str) -> list[list[float]]:
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row[name] for name in names] for row in logged if names[0] in row]


def weights(run: Path, step: str = "LATEST") -> dict[str, torch.Tensor]:
    return load_file(run / step / "model" / "model.safetensors")


@pytest.fixture
def steps(monkeypatch):
    """The policy's own weights before the first step and after each."""
    kept = []

    def keep(trainer):
        kept.append({name: one.detach().double().clone() for name, one in trainer.policy.named_parameters()})

    original = Trainer.train_step

    def train_step(self, *arguments):
        if not kept:
            keep(self)
        agreed = original(self, *arguments)
        keep(self)
        return agreed

    monkeypatch.setattr(Trainer, "train_step", train_step)
    return kept


def test_the_average_is_the_sum_of_all_weights_so_far(tmp_path, steps):
    """d^n w_0 + (1 - d) (sum over k of d^(n - k) w_k), saved as model/; without `save` that has the policy's own."""
    saved = weights(start(tmp_path, "run", settings_of("ema")))
    n = len(steps) - 1
    assert n == 12
    for name, value in saved.items():
        own = [one[name] for one in steps]
        closed = 0.8**n * own[0] + 0.2 * sum(0.8 ** (n - k) * own[k] for k in range(1, n + 1))
        torch.testing.assert_close(value.double(), closed, rtol=0, atol=1e-6)
    assert max((value - steps[-1][name]).abs().max() for name, value in saved.items()) > 1e-4
    beside = weights(start(tmp_path, "beside", settings_of("ema beside")))
    assert all(torch.equal(value.double(), steps[-1][name]) for name, value in beside.items())
    # The average is what both have evaluated.
    assert rows(tmp_path / "run", "loss/eval") == rows(tmp_path / "beside", "loss/eval")


def test_the_average_is_evaluated(tmp_path):
    """What was saved as model/, evaluated by itself, has the log-probabilities that the run logged."""
    name = "logps_eval/chosen"
    expected = rows(start(tmp_path, "run", settings_of("ema")), name)[-1]
    model = tiny_model()
    model.load_state_dict(weights(tmp_path / "run"))

    def evaluate(layout):
        with RunDir.open(tmp_path / "again", config={}, manifest={}) as run:
            trainer = tiny_trainer(tmp_path, layout, run, settings_of("ema"), model=model)
            assert [trainer.evaluate()[0][name]] == pytest.approx(expected, abs=1e-9)

    launch(evaluate, settings_of("ema"))


def test_an_average_of_16_bit_weights_does_not_stand_still():
    """Updates of 1/1000 of a difference would be rounded away in bfloat16; one process's own weights come back."""
    model = tiny_model(dtype=torch.bfloat16)
    following = FollowingWeights(model, 1e-3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.25
    own = {name: one.detach().clone() for name, one in model.named_parameters()}
    before = {name: value.clone() for name, value in following.values.items()}
    for _ in range(1000):
        following.update()
    with following.in_place():
        assert not torch.equal(model.lm_head.weight, own["lm_head.weight"])
    for name, parameter in model.named_parameters():
        expected = own[name] + 0.999**1000 * (before[name] - own[name])
        torch.testing.assert_close(following.values[name], expected, rtol=0, atol=1e-4)
        assert torch.equal(parameter, own[name])


@pytest.mark.parametrize("kind", ["ema beside", "bco", "both"])
def test_a_run_that_was_cut_ends_as_one_that_was_not(tmp_path, kind):
    """Cut between two renewals, and after the end of an epoch."""
    settings = settings_of(kind, checkpoint=CheckpointSettings(every_examples=5))
    run = start(tmp_path, "whole", settings)
    folders = sorted((run / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.split("-")[1]))
    whole = {folder.name: weights(run, f"checkpoints/{folder.name}") for folder in folders}
    for last in (3, 6):
        cut = tmp_path / f"cut-{last}"
        shutil.copytree(run, cut, symlinks=True)
        for folder in folders[last:]:
            shutil.rmtree(cut / "checkpoints" / folder.name)
        (cut / "LATEST").unlink()
        start(tmp_path, cut.name, settings)
        for name, expected in whole.items():
            again = weights(cut, f"checkpoints/{name}")
            assert all(torch.equal(again[key], expected[key]) for key in expected), (last, name)
        assert rows(cut, "loss/eval") == rows(run, "loss/eval")


def test_two_processes_do_what_one_does(tmp_path):
    one = start(tmp_path, "one", settings_of("both"))
    two = start(tmp_path, "two", settings_of("both", processes=2))
    for name in ("loss/train", "loss/eval"):
        assert torch.tensor(rows(two, name)).allclose(torch.tensor(rows(one, name)), rtol=0, atol=1e-5)
    for name, expected in weights(one).items():
        assert (weights(two)[name] - expected).abs().mean() < 1e-6
    # What two have begun, one goes on with.
    newest = max((two / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.split("-")[1]))
    shutil.rmtree(newest)
    again = start(tmp_path, "two", settings_of("both"))
    for name, expected in weights(one).items():
        assert (weights(again)[name] - expected).abs().mean() < 1e-6


def logp(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    logps = model(torch.tensor([prompt + response]), use_cache=False).logits[0].double().log_softmax(-1)
    start = len(prompt)
    return sum(logps[start + t - 1, token] for t, token in enumerate(response))


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_renewals_are_those_of_a_loop_with_two_models(tmp_path, alpha):
    """TR-DPO written out: a second model that takes in alpha of the first one every 10 examples."""
    settings = settings_of(
        "renewed", loss=DPOSettings(beta=0.5), optimizer_args={"weight_decay": 0.0},
        max_grad_norm=1e9, warmup_steps=0,
    )  # fmt: skip
    settings = replace(settings, reference=ReferenceSettings(refresh_examples=10, refresh_alpha=alpha))
    run = start(tmp_path, "run", settings)
    store = random_store(tmp_path, num_rows=22, segments=3)
    policy, reference = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.lr, weight_decay=0.0)
    seen = renewed = 0
    losses, starts = [], []
    for batch, _ in train_loader(store, settings).plan():
        if seen - renewed >= 10:
            renewed = seen
            starts.append(len(losses))
            with torch.no_grad():
                for theirs, own in zip(reference.parameters(), policy.parameters(), strict=True):
                    theirs.copy_((1 - alpha) * theirs + alpha * own)
        terms = []
        for row in batch.tolist():
            prompt, *responses = (segment.tolist() for segment in store.row(row))
            with torch.no_grad():
                before = [logp(reference, prompt, response) for response in responses]
            ratios = [logp(policy, prompt, one) - two for one, two in zip(responses, before, strict=True)]
            terms.append(-F.logsigmoid(0.5 * (ratios[0] - ratios[1])))
        loss = torch.stack(terms).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seen += len(batch)
    logged = rows(run, "loss/train", "rewards_train/chosen", "rewards_train/rejected")
    assert [row[0] for row in logged] == pytest.approx(losses, abs=1e-5)
    assert starts == [3, 6, 9]
    rewards = [max(abs(row[1]), abs(row[2])) for row in logged]
    for step in range(1, len(losses)):
        is_start = alpha == 1 and step in starts
        assert rewards[step] < 1e-6 if is_start else rewards[step] > 1e-4, (step, rewards)
        if is_start:
            assert logged[step][0] == pytest.approx(math.log(2), abs=1e-6)


ERRORS = [
    ("simpo", {"reference": ReferenceSettings(refresh_examples=8)},
     "reference.refresh_examples=8: loss=simpo has no reference to renew; leave it out, or write"),
    ("sft", {"reference": ReferenceSettings(refresh_examples=8)}, "loss=sft has no reference to renew"),
    ("dpo", {"reference": ReferenceSettings(refresh_alpha=0.5)},
     "reference.refresh_alpha=0.5: the reference is never renewed; write reference.refresh_examples=N, too"),
    ("dpo", {"reference": ReferenceSettings(refresh_examples=8), "reference_dtype": "bfloat16"},
     "reference.refresh_examples=8: a renewed reference has the policy's dtype; leave model.reference_dtype out"),
    ("dpo", {"ema": EMASettings(decay=1.0)}, "ema.decay=1.0: must lie in (0, 1); 0.999 averages over some 1,000 steps"),
    ("dpo", {"ema": EMASettings(save=False)}, "ema.save=false: there is no average; write ema.decay=0.999, too"),
    ("dpo", {"ema": EMASettings(decay=0.9, save=False), "checkpoint": CheckpointSettings(keep_best="loss/eval")},
     "checkpoint.keep_best=loss/eval: with ema.save=false the average is evaluated, but the policy's own weights"),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "changes", "message"), ERRORS)
def test_errors(tmp_path, loss, changes, message):
    (found,) = faults(tmp_path, LOSSES[loss](), changes=changes)
    assert message in found


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_renewed_reference_of_an_adapter(tmp_path, dropout):
    """Its dropout is training's alone: behind a renewal the weights are the same, and the rewards not 0."""
    model = replace(tiny_settings().model, lora=LoraSettings(r=4, dropout=dropout))
    run = start(tmp_path, "run", settings_of("renewed", lr=1e-2, model=model))
    largest = [abs(one) for one, examples in rows(run, "rewards_train/margins", "counters/examples") if examples == 16]
    assert (largest[0] > 1e-3) == (dropout > 0)
