"""The loop: what it steps, evaluates, logs, samples and refuses."""

import json
import math
import re
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config.errors import UserError
from config.names import OPTIMIZERS
from config.settings import LOSSES, CheckpointSettings, IPOSettings, LikelihoodLossSettings, TrainConfig
from tests.tiny_models import tiny_model
from tests.tiny_runs import tiny_settings, tiny_trainer
from trainers import trainer as trainer_module
from trainers.distributed.launch import launch
from trainers.objectives.output import NotFiniteError
from trainers.optimizers import build_optimizer, learning_rate
from trainers.run.run_dir import RunDir
from trainers.trainer import Trainer


def train(folder, settings, *, run_path=None, **arguments):
    """A whole run in a process group; returns the trainer, its rows of metrics and its run directory."""
    kept = {}

    def worker(layout):
        with RunDir.open(run_path or folder / "run", config=asdict(settings), manifest={}) as run:
            kept["run"] = run
            kept["trainer"] = tiny_trainer(folder, layout, run, settings, **arguments)
            kept["trainer"].train()

    launch(worker, settings)
    rows = [json.loads(line) for line in kept["run"].metrics.read_text().splitlines()]
    return kept["trainer"], rows, kept["run"]


def test_a_dpo_run_from_end_to_end(tmp_path):
    _, rows, run = train(tmp_path, tiny_settings(n_epochs=4, lr=3e-3))
    training = [row for row in rows if "loss/train" in row]
    evaluations = [row for row in rows if "loss/eval" in row]
    assert len(training) == 4 * 6  # 22 rows in batches of 4: the rest of 2 is a batch, too
    assert training[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-6)
    # Ties up to rounding: the reference was computed in batches of other shapes. Exact ties: tests/test_losses.py.
    assert abs(training[0]["rewards_train/margins"]) < 1e-5
    assert evaluations[0]["loss/eval"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(evaluations[0]["rewards_eval/margins"]) < 1e-5
    assert training[-1]["loss/train"] < 0.5  # it has learned its rows by heart
    # First, after the batches that pass a multiple of 8, and last.
    assert [row["counters/examples"] for row in evaluations] == [0, 8, 16, 26, 34, 42, 48, 56, 64, 74, 82, 88]
    assert [row["counters/updates"] for row in training] == list(range(1, 25))
    assert (run.path / "LATEST").resolve().name == "step-88"


DPO_REPO_NAMES = {
    "rewards_{}/chosen", "rewards_{}/rejected", "rewards_{}/accuracies", "rewards_{}/margins",
    "logps_{}/chosen", "logps_{}/rejected", "loss/{}",
}  # fmt: skip


def test_every_metric_of_the_dpo_repo_is_there(tmp_path):
    _, rows, _ = train(tmp_path, tiny_settings())
    counters = {"counters/examples", "counters/updates"}
    speed = {"examples_per_second", "grad_norm"}
    training = next(row for row in rows if "loss/train" in row)
    evaluation = next(row for row in rows if "loss/eval" in row)
    assert {name.format("train") for name in DPO_REPO_NAMES} | counters | speed <= training.keys()
    assert {name.format("eval") for name in DPO_REPO_NAMES} | counters <= evaluation.keys()
    assert {"learning_rate", "tokens_per_second", "data_wait_seconds"} <= training.keys()


@pytest.mark.parametrize("name", ["sft", "reverse"])
def test_likelihood_runs(tmp_path, name):
    reduction = "sequence_sum" if name == "sft" else "token_mean"
    settings = tiny_settings(
        loss=LikelihoodLossSettings(name=name, reduction=reduction),
        n_epochs=8, optimizer="AdamW", lr=1e-2, do_first_eval=False, activation_checkpointing=True,
    )  # fmt: skip
    _, rows, _ = train(tmp_path, settings)
    training = [row for row in rows if "loss/train" in row]
    assert training[-1]["nll_train"] < 0.7 * training[0]["nll_train"]
    assert next(row["counters/examples"] for row in rows if "loss/eval" in row) == 8


def test_all_examples_of_a_log_interval_are_averaged(tmp_path):
    """Without pauses every step is a row; with one long pause all of them are one row: their mean by examples."""
    _, steps, _ = train(tmp_path, tiny_settings(lr=1e-9), run_path=tmp_path / "steps")
    _, rows, _ = train(tmp_path, tiny_settings(lr=1e-9, minimum_log_interval_secs=1e9), run_path=tmp_path / "one")
    steps = [row for row in steps if "loss/train" in row]
    (only,) = [row for row in rows if "loss/train" in row]
    sizes = [4, 4, 4, 4, 4, 2]
    for name in ("logps_train/chosen", "rewards_train/margins", "loss/train"):
        mean = sum(row[name] * n for row, n in zip(steps, sizes, strict=True)) / 22
        assert only[name] == pytest.approx(mean, rel=1e-9, abs=1e-12)


class Waits(TorchDispatchMode):
    """Notes what makes the host wait for its device, which is `meta`: numbers read, and copies that are not queued."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source = next((one for one in args if isinstance(one, torch.Tensor)), None)
        if function is torch.ops.aten._local_scalar_dense.default and source.is_meta:
            self.found.append("read")
            return True
        if function is torch.ops.aten._to_copy.default:
            devices = {source.device.type, torch.device(kwargs.get("device") or source.device).type}
            if len(devices) == 2 and not kwargs.get("non_blocking"):
                self.found.append("copy")
            if source.is_meta and devices == {"meta", "cpu"}:
                return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)  # the host reads numbers
        if function is torch.ops.aten.copy_.default:
            non_blocking = len(args) > 2 and args[2]
            if source.device != args[1].device and not non_blocking:
                self.found.append("copy")
        return function(*args, **kwargs)


def test_a_step_waits_for_the_device_once(tmp_path, monkeypatch):
    """For whether to take the step. All but the kernels: those stand in a function of one parameter here."""
    settings = tiny_settings(gradient_accumulation_steps=2)
    reduce, kept = torch.distributed.all_reduce, {}
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: None if values.is_meta else reduce(values))

    def worker(layout):
        with RunDir.open(tmp_path / "run", config=asdict(settings), manifest={}) as run:
            trainer = tiny_trainer(tmp_path, layout, run, settings)
            on_device = replace(layout, device=torch.device("meta"))
            policy = trainer.policy.to("meta")
            trainer = Trainer(
                policy=policy, objective=trainer.objective, train_loader=trainer.train_loader, eval_loader=None,
                settings=settings, layout=on_device, run=run,
            )  # fmt: skip
            weight = policy.get_output_embeddings().weight

            def logps_of(batch):
                assert all(value.is_meta for value in batch.values())
                ones = torch.ones(len(batch["row"]), 2, dtype=torch.float64, device="meta")
                return ones * weight.double().sum(), ones.long()

            trainer.logps_of = logps_of
            first, second = (replace(batch, start_examples=4) for batch in list(trainer.train_loader.batches())[:2])
            with Waits() as waits:
                trainer.train_step(first)  # makes the optimizer's state
                waits.found.clear()
                trainer.train_step(second)
            kept.update(found=waits.found, updates=trainer.progress.updates, skipped=trainer.progress.skipped)

    launch(worker, settings)
    assert kept == {"found": ["copy"], "updates": 2, "skipped": 0}  # the norm and the loss, in one


def test_samples_are_written_at_each_evaluation_and_disturb_nothing(tmp_path):
    def sampler(model):
        assert not model.training
        torch.rand(100)
        return [{"id": "a", "output": "text"}]

    settings = tiny_settings(sample_during_eval=True, eval_every=8)
    sampled, _, run = train(tmp_path, settings, sampler=sampler, run_path=tmp_path / "sampled")
    random_state = torch.get_rng_state()
    rows = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert [row["counters/examples"] for row in rows] == [0, 8, 16, 22]
    plain, _, _ = train(tmp_path, tiny_settings(eval_every=100), run_path=tmp_path / "plain")
    assert weights_equal(sampled.policy, plain.policy)
    assert torch.equal(random_state, torch.get_rng_state())  # both began with the seed of the tiny model


def weights_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_debug_leaves_no_checkpoint(tmp_path):
    _, rows, run = train(tmp_path, tiny_settings(debug=True))
    assert rows
    assert not run.checkpoints.exists()


@pytest.mark.parametrize("on_non_finite", ["stop", "skip"])
def test_a_step_that_is_not_finite(tmp_path, on_non_finite):
    """One row's reference is infinite: its batch has no finite loss."""
    settings = tiny_settings(on_non_finite=on_non_finite, n_epochs=1)
    kept = {}

    def worker(layout):
        with RunDir.open(tmp_path / "run", config=asdict(settings), manifest={}) as run:
            trainer = kept["trainer"] = tiny_trainer(tmp_path, layout, run, settings)
            third = next(trainer.train_loader.batches(8)).rows
            kept["row"] = int(third[1])
            trainer.train_loader.columns["reference_logps"][kept["row"], 1] = math.nan
            trainer.train()

    if on_non_finite == "skip":
        launch(worker, settings)
        assert kept["trainer"].progress.skipped == 1
        assert all(torch.isfinite(p).all() for p in kept["trainer"].policy.parameters())
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert all(math.isfinite(value) for row in rows for value in row.values())
        assert rows[-1]["counters/skipped"] == 1
        return
    with pytest.raises(UserError, match="is not finite") as caught:
        launch(worker, settings)
    assert re.search(rf"examples row-{kept['row']} \(row {kept['row']}\)\. It", str(caught.value))
    assert "after 8 examples" in str(caught.value)
    assert "on_non_finite=skip" in str(caught.value)
    assert (tmp_path / "run" / "LATEST").resolve().name == "step-8"


def test_the_first_step_refuses_a_reference_of_other_weights(tmp_path):
    settings = tiny_settings(do_first_eval=False)

    def worker(layout):
        with RunDir.open(tmp_path / "run", config=asdict(settings), manifest={}) as run:
            trainer = tiny_trainer(tmp_path, layout, run, settings)
            with torch.no_grad():
                trainer.policy.get_output_embeddings().weight.mul_(1.1)
            trainer.train()

    with pytest.raises(UserError, match="before the first step the policy is the reference"):
        launch(worker, settings)


def test_a_model_with_a_scaled_head_is_refused(tmp_path):
    with pytest.raises(UserError, match="GraniteForCausalLM changes its logits"):
        train(tmp_path, tiny_settings(), model=tiny_model("granite"))


def test_learning_rate_schedules():
    settings = TrainConfig(exp_name="x", lr=2.0, warmup_steps=3)
    assert [learning_rate(u, 10, settings) for u in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]  # the DPO repo's warm-up
    settings.lr_scheduler = "linear"
    assert [learning_rate(u, 7, settings) for u in (3, 5, 7)] == [2.0, 1.0, 0.0]
    settings.lr_scheduler = "cosine"
    assert [learning_rate(u, 7, settings) for u in (3, 5, 7)] == pytest.approx([2.0, 1.0, 0.0])
    settings.warmup_ratio = 0.5
    assert [learning_rate(u, 4, settings) for u in range(4)] == pytest.approx([2 / 3, 4 / 3, 2.0, 1.0])


def test_optimizers_by_name():
    parameters = [torch.nn.Parameter(torch.ones(2, 2))]
    for name in OPTIMIZERS:
        settings = TrainConfig(exp_name="x", optimizer=name, lr=1e-3)
        assert type(build_optimizer(parameters, settings)).__name__ == name
    with pytest.raises(UserError, match="momentumm"):
        build_optimizer(parameters, TrainConfig(exp_name="x", optimizer="SGD", optimizer_args={"momentumm": 1}))


def test_ipo_starts_at_its_known_loss(tmp_path):
    _, rows, _ = train(tmp_path, tiny_settings(loss=IPOSettings(name="ipo", average_logps=True)))
    assert next(row["loss/train"] for row in rows if "loss/train" in row) == pytest.approx(25.0, rel=1e-6)


def test_checkpoints_at_their_own_interval(tmp_path):
    settings = tiny_settings(eval_every=100, checkpoint=CheckpointSettings(every_examples=12, keep_last=None))
    _, _, run = train(tmp_path, settings)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-12", "step-22"]


@pytest.mark.parametrize(("variable", "count"), [("WORLD_SIZE", "2"), ("SLURM_STEP_NUM_TASKS", "4")])
def test_one_process_under_a_launcher_of_several_is_refused(monkeypatch, variable, count):
    monkeypatch.setenv(variable, count)
    with pytest.raises(UserError, match=f"{variable}={count}"):
        launch(lambda layout: None, tiny_settings())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="device=cuda"):
        launch(lambda layout: None, tiny_settings(device="cuda"))


@pytest.mark.parametrize("on_non_finite", ["stop", "skip"])
def test_weights_that_a_step_destroyed_are_never_saved(tmp_path, on_non_finite):
    """The default eps of RMSprop, 1e-8, is 0 in float16: a gradient that is 0 there divides by 0."""
    settings = tiny_settings(on_non_finite=on_non_finite, do_first_eval=False)
    settings.model.policy_dtype = "float16"
    with pytest.raises(NotFiniteError, match="the weights hold NaN or infinite numbers after"):
        train(tmp_path, settings, model=tiny_model(dtype=torch.float16))
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


@pytest.mark.parametrize("on_non_finite", ["stop", "skip"])
def test_a_step_that_was_not_taken_is_not_in_the_mean_of_the_rewards(tmp_path, monkeypatch, on_non_finite):
    """Its gradient is infinite once, in the second step: a run that stops there counts its rewards when it goes on."""
    settings = tiny_settings(loss=LOSSES["bco_pair"](), n_epochs=1, on_non_finite=on_non_finite)
    clip, calls = trainer_module.clip_grad_norm, []

    def failing(*arguments):
        norm, loss = clip(*arguments)
        calls.append(norm)
        return (math.inf if len(calls) == 2 else norm), loss

    monkeypatch.setattr(trainer_module, "clip_grad_norm", failing)
    if on_non_finite == "stop":
        with pytest.raises(NotFiniteError):
            train(tmp_path, settings)
    trainer, *_ = train(tmp_path, settings)
    assert trainer.progress.objective["rewards"] == 2 * (22 if on_non_finite == "stop" else 18)
