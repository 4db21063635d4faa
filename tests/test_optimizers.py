"""Clipping and the optimizer's step: their values against plain torch, and the traffic of a parameter, counted."""

import math
import shutil
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config.errors import UserError
from config.names import OPTIMIZERS, WITHOUT_SHARDS
from config.settings import TrainConfig, TrainerSettings
from tests.ranks import run_ranks
from tests.tiny_models import tiny_model
from tests.tiny_runs import tiny_settings, tiny_trainer
from trainers.distributed import sharding
from trainers.distributed.launch import launch
from trainers.optimizers import (
    RMSprop,
    TwoOptimizers,
    build_optimizer,
    learning_rate,
    rmsprop_pass,
    tables_of,
    warmup_note,
)
from trainers.run.run_dir import RunDir

SIZE = 1000 * 1000
BYTES_OF_CLIP, BYTES_OF_STEP = 4, 20  # of a float32 parameter; together at most 24


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, where each is one kernel. Views move nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if not func.is_view:
            written = args[0] if func._schema.is_mutable else result
            self.bytes += size_of(tensors) + size_of(tree_leaves(written))
        if func is torch.ops.aten.linalg_vector_norm.default and (kwargs or {}).get("dtype") == torch.float64:
            self.bytes += 2 * 8 * sum(tensor.numel() for tensor in tensors)  # a GPU makes a float64 copy first
        return result


def size_of(values) -> int:
    return sum(one.numel() * one.element_size() for one in values if isinstance(one, torch.Tensor))


def parameters_with_gradients(scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(500, 1000), (SIZE - 500 * 1000 - 7,), (7,)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * scale).to(dtype)
    return parameters


def clip(parameters, max_norm, mode=None):
    """(norm, loss) of `clip_grad_norm` in a run of one process."""
    kept = []

    def worker(layout):
        if mode is None:
            kept.append(sharding.clip_grad_norm(parameters, max_norm, torch.tensor(2.5), layout))
        else:
            with mode:
                kept.append(sharding.clip_grad_norm(parameters, max_norm, torch.tensor(2.5), layout))

    launch(worker, TrainConfig(exp_name="x", device="cpu"))
    return kept[0]


def test_gradients_are_scaled_to_the_bound():
    parameters, plain = parameters_with_gradients(), parameters_with_gradients()
    exact = math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in plain))
    norm, loss = clip(parameters, 10.0)
    assert norm == pytest.approx(exact, rel=1e-12)
    assert loss == 2.5
    torch.nn.utils.clip_grad_norm_(plain, 10.0)
    for one, two in zip(parameters, plain, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=0)


def test_a_norm_within_the_bound_or_not_finite_writes_no_gradient():
    for max_norm, value in ((1e9, 1.0), (1.0, math.inf), (1.0, math.nan)):
        parameters = parameters_with_gradients()
        parameters[1].grad[3] = value
        versions = [parameter.grad._version for parameter in parameters]
        clip(parameters, max_norm)
        assert [parameter.grad._version for parameter in parameters] == versions


def inductor_bytes(function, *arguments) -> int:
    """What the kernels that Inductor makes of a function read and write; its cache would hide what it finds there."""
    metrics.reset()
    torch._dynamo.reset()
    torch._logging.set_logs(inductor_metrics=True)  # without it Inductor does not count
    try:
        with inductor_config.patch(force_disable_caches=True):
            torch.compile(function, dynamic=True, fullgraph=True)(*arguments)
    finally:
        torch._logging.set_logs()
    return metrics.num_bytes_accessed


def test_clip_and_step_move_24_bytes_a_parameter():
    parameters = parameters_with_gradients()
    traffic = Traffic()
    clip(parameters, 1e9, traffic)
    assert traffic.bytes / SIZE == pytest.approx(BYTES_OF_CLIP, abs=0.01)
    with torch.no_grad():
        tensors = [torch.rand(SIZE) for _ in range(3)]
        moved = inductor_bytes(partial(rmsprop_pass, alpha=0.99, eps=1e-8), *tensors, torch.tensor(1e-3))
    assert moved / SIZE == pytest.approx(BYTES_OF_STEP, abs=0.01)

    optimizer = torch.optim.RMSprop(parameters, foreach=True)
    optimizer.step()
    foreach = Traffic()
    with foreach:
        optimizer.step()
    assert foreach.bytes / SIZE == pytest.approx(56, abs=0.01)  # what this replaces


@pytest.fixture
def not_compiled(monkeypatch):
    """The pass as Python has it: what a compiler makes of it is the compiler's."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.usefixtures("not_compiled")
def test_the_one_pass_is_torchs_rmsprop():
    one, two = parameters_with_gradients(), parameters_with_gradients()
    ours, theirs = RMSprop(one, lr=1e-3, alpha=0.9), torch.optim.RMSprop(two, lr=1e-3, alpha=0.9, foreach=False)
    for step in range(20):
        for left, right in zip(one, two, strict=True):
            left.grad = right.grad = torch.randn(left.shape, generator=torch.Generator().manual_seed(step))
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            optimizer.step()
    for left, right in zip(one, two, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
        assert torch.equal(ours.state[left]["square_avg"], theirs.state[right]["square_avg"])
    theirs.load_state_dict(ours.state_dict())  # a checkpoint may go on with either
    assert theirs.state[two[0]]["step"] == 20


def test_on_a_cpu_the_optimizer_is_torchs_own():
    parameters = parameters_with_gradients()
    assert type(build_optimizer(parameters, TrainConfig(exp_name="x"))) is torch.optim.RMSprop
    with torch.device("meta"):
        on_device = [torch.nn.Parameter(torch.empty(3))]
    assert type(build_optimizer(on_device, TrainConfig(exp_name="x"))) is torch.optim.RMSprop


def test_a_warm_up_that_the_run_does_not_outlast_is_said():
    settings = TrainConfig(exp_name="x", warmup_steps=150)
    assert "150 steps is not over when this run ends, after 3" in warmup_note(3, settings)
    assert "2% of lr" in warmup_note(3, settings)  # 3 / 151
    assert learning_rate(2, 3, settings) == pytest.approx(settings.lr * 3 / 151)
    assert warmup_note(151, settings) == warmup_note(3, TrainConfig(exp_name="x", warmup_ratio=0.1)) == ""


MUON = {"optimizer": "Muon", "fallback_optimizer": "AdamW", "lr": 1e-2}


def test_muon_steps_matrices_and_its_fallback_the_rest():
    """After a few steps every parameter is where torch's own Muon or AdamW over it alone has put it."""
    settings = TrainConfig(exp_name="x", **MUON, optimizer_args={"momentum": 0.9}, fallback_args={"eps": 1e-6})
    ours, theirs = tiny_model(), tiny_model()
    optimizer = build_optimizer(ours.parameters(), settings, tables_of(ours))
    assert isinstance(optimizer, TwoOptimizers)
    tables = {id(one) for one in tables_of(theirs)}
    alone = []
    for parameter in theirs.parameters():
        if parameter.ndim == 2 and id(parameter) not in tables:
            alone.append(torch.optim.Muon([parameter], lr=1e-2, momentum=0.9))
        else:
            alone.append(torch.optim.AdamW([parameter], lr=1e-2, eps=1e-6))
    assert {type(one).__name__ for one in alone} == {"Muon", "AdamW"}
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = two.grad = torch.randn(one.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        for other in alone:
            other.param_groups[0]["lr"] = 1e-2 / (step + 1)
            other.step()
        optimizer.step()
        if step == 1:  # a checkpoint replaces groups and state
            optimizer.load_state_dict(optimizer.state_dict())
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_muon_without_a_fallback_is_refused():
    model = tiny_model()
    with pytest.raises(UserError, match="write fallback_optimizer=AdamW"):
        build_optimizer(model.parameters(), TrainConfig(exp_name="x", optimizer="Muon"), tables_of(model))


def test_norms_and_biases_do_not_decay():
    """Without a gradient AdamW moves a parameter by its decay alone."""
    settings = TrainConfig(exp_name="x", optimizer="AdamW", lr=0.1, optimizer_args={"weight_decay": 0.5})
    for weight_decay_on, decayed in (("all", 0.95), ("matrices", 1.0)):
        settings.weight_decay_on = weight_decay_on
        vector, matrix = (torch.nn.Parameter(torch.ones(shape)) for shape in ((3,), (3, 3)))
        optimizer = build_optimizer([vector, matrix], settings)
        for parameter in (vector, matrix):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        torch.testing.assert_close(vector.data, torch.full((3,), decayed))
        torch.testing.assert_close(matrix.data, torch.full((3, 3), 0.95))


def test_warm_up_stable_decay():
    settings = TrainConfig(exp_name="x", lr=2.0, warmup_steps=2, lr_scheduler="wsd", decay_ratio=0.4)
    rates = [learning_rate(update, 10, settings) for update in range(11)]
    assert rates == pytest.approx([2 / 3, 4 / 3, 2, 2, 2, 2, 2, 1.5, 1.0, 0.5, 0.0])
    settings = TrainConfig(exp_name="x", lr=1.0, warmup_steps=7, lr_scheduler="wsd", decay_ratio=1.0)
    rates = [learning_rate(update, 8, settings) for update in range(9)]
    assert rates == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0])  # no jump


STEPPED = {name: {"optimizer": name} for name in OPTIMIZERS if name not in WITHOUT_SHARDS} | {
    "Muon": {**MUON, "lr": 1e-3}, "Muon and SGD": {**MUON, "lr": 1e-3, "fallback_optimizer": "SGD"},
}  # fmt: skip


def step_with_each(layout, folder):
    """A run of each, `<name> of <processes>`: three batches of 4 rows."""
    for name, keys in STEPPED.items():
        settings = tiny_settings(**keys, n_examples=12, do_first_eval=False)
        run = folder / f"{name} of {layout.world_size}"
        opened = layout.main_only(lambda run=run: RunDir.open(run, config={}, manifest={}))
        sharded = TrainerSettings("BasicTrainer" if layout.world_size == 1 else "FSDPTrainer")
        with opened or RunDir(run, None) as of:
            tiny_trainer(folder, layout, of, replace(settings, trainer=sharded)).train()


def test_every_optimizer_steps_shards_as_it_steps_the_whole(tmp_path):
    """Muon orthogonalises in bfloat16, which rounds a matrix in two parts otherwise than one."""
    two = tiny_settings(trainer=TrainerSettings("FSDPTrainer", 2))
    run_ranks(step_with_each, 2, two, tmp_path)
    launch(lambda layout: step_with_each(layout, tmp_path), tiny_settings())
    for name in STEPPED:
        one, other = (load_file(tmp_path / f"{name} of {n}" / "LATEST/model/model.safetensors") for n in (1, 2))
        tolerance = 1e-4 if name.startswith("Muon") else 1e-6
        for key, tensor in one.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=tolerance, msg=f"{name} {key}")


def test_muon_trains_saves_and_goes_on(tmp_path):
    """A run that was cut in its middle ends as one that was not."""
    settings = tiny_settings(**MUON, n_epochs=2)

    def train(name):
        def worker(layout):
            with RunDir.open(tmp_path / name, config=asdict(settings), manifest={}) as run:
                tiny_trainer(tmp_path, layout, run, settings).train()

        launch(worker, settings)
        return load_file(tmp_path / name / "LATEST" / "model" / "model.safetensors")

    whole, cut = train("whole"), train("cut")
    run = tmp_path / "cut"
    newest, *_ = sorted((run / "checkpoints").glob("step-*"), key=lambda folder: -int(folder.name.split("-")[1]))
    shutil.rmtree(newest)
    again = train("cut")
    assert all(torch.equal(whole[name], cut[name]) and torch.equal(whole[name], again[name]) for name in whole)
