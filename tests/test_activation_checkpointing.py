"""`activation_checkpointing=none|selective|full`: the same gradients, by more or less work in the backward pass."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config.settings import TrainerSettings
from tests.commands import configs_of, errors_of
from tests.test_packing import PAIRS, exact_model, logps_and_gradients, microbatch, packed_model, store_of
from tests.test_parallel import losses, settings_of, start
from tests.tiny_models import PACKABLE
from trainers.distributed.layout import Layout
from trainers.distributed.parallelize import parallelize

ATEN = torch.ops.aten
PRODUCTS = (
    ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN._scaled_dot_product_flash_attention_for_cpu.default,
)  # fmt: skip
ACTIVATIONS = (ATEN.silu.default, ATEN.gelu.default, ATEN.tanh.default)
COMMAND = ["loss=sft", "model=blank_model", "model.name_or_path=some/model", "datasets.si.path=README.md", "exp_name=a"]


class OperatorCalls(TorchDispatchMode):
    """Counts what is computed, forward and backward."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))

    def of(self, operators) -> int:
        return sum(self.counts[operator] for operator in operators)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", PACKABLE)
def test_selective_computes_again_all_but_the_products(tmp_path, name, packing):
    batch = microbatch(store_of(tmp_path / "store", PAIRS), packing=packing)
    gradients, calls = {}, {}
    for how in ("none", "selective", "full"):
        model = (packed_model(name, shortcut=False) if packing else exact_model(name)).train()
        layout = Layout(0, 1, torch.device("cpu"))
        parallelize(model, layout, trainer=TrainerSettings(), packing=True, activation_checkpointing=how)
        with OperatorCalls() as calls[how]:
            gradients[how] = logps_and_gradients(model, batch)[2]
    for how in ("selective", "full"):
        for key, truth in gradients["none"].items():
            torch.testing.assert_close(gradients[how][key], truth, rtol=1e-12, atol=1e-12, msg=f"{how} {key}")
    products = {how: one.of(PRODUCTS) for how, one in calls.items()}
    activations = {how: one.of(ACTIVATIONS) for how, one in calls.items()}
    assert products["none"] == products["selective"] < products["full"]
    assert activations["none"] < activations["selective"] == activations["full"]


def test_a_sharded_model_is_trained_selectively(tmp_path):
    start(tmp_path, "one", settings_of("dpo", 2, 1, 1, n_epochs=1))
    start(tmp_path, "two", settings_of("dpo", 2, 2, 1, n_epochs=1, activation_checkpointing="selective"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize(("written", "read"), [("true", True), ("false", False), ("selective", "selective")])
def test_it_is_written_as_a_word_or_as_true_or_false(written, read, monkeypatch):
    (config,) = configs_of([*COMMAND, f"activation_checkpointing={written}"], monkeypatch)
    assert config.activation_checkpointing == read


def test_another_word_is_refused(monkeypatch, capsys):
    errors = errors_of([*COMMAND, "activation_checkpointing=selectiv"], monkeypatch, capsys)
    assert any("did you mean selective? Choices: none, selective, full, true, false" in line for line in errors)
