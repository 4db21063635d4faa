"""Mistakes in the choice of a loss and of its data, each one message before anything runs."""

import math

import pytest

from config.checks_train import check_train
from config.schema import compose_config
from config.settings import LOSSES, DatasetSettings, MixtureSettings, TrainConfig
from tests.commands import write_pairs

HINT = "the parts of a mixture are losses on pairs, and "
MIXTURES = [
    ({}, "loss.parts={}: name two losses or more, such as loss.parts.dpo.weight=0.8"),
    ({"dpo": {}}, "name two losses or more"),
    ({"dpo": {}, "kto": {}}, f"loss.parts.kto: {HINT}kto reads answers."),
    ({"dpo": {}, "sft": {}}, f"loss.parts.sft: {HINT}sft reads responses."),
    ({"dpo": {}, "mixture": {}}, f"{HINT}mixture reads pairs."),
    ({"dpo": {}, "sipmo": {}}, "there is no loss sipmo; did you mean simpo?"),
    ({"dpo": {}, "slic": 0.3}, "loss.parts.slic=0.3: must be the keys of slic: loss.parts.slic={weight:0.5}"),
    ({"dpo": {"gama": 1.0}, "slic": {}}, "loss.parts.dpo.gama=1.0: dpo has no key gama"),
    ({"dpo": {"beta": "x"}, "slic": {}}, "loss.parts.dpo.beta=x: must be a value such as 0.1"),
    ({"dpo": {"beta": -1.0}, "slic": {}}, "loss.parts.dpo.beta=-1.0: must be above 0"),
    ({"dpo": {"weight": 0}, "slic": {}}, "loss.parts.dpo.weight=0: must be above 0"),
    ({"dpo": {"ld_alpha": 0.5}, "slic": {}}, "ld_alpha must be the same in all parts"),
]  # fmt: skip


def faults(tmp_path, loss, *, changes=None, **dataset):
    data = {"path": str(write_pairs(tmp_path / "pairs.jsonl", 4)), "schema": "si", **dataset}
    changes = dict(changes or {})
    reference_dtype = changes.pop("reference_dtype", None)
    config = TrainConfig(exp_name="a", loss=loss, datasets={"si": DatasetSettings(**data)}, **changes)
    config.model.name_or_path, config.model.reference_dtype = "hub/name", reference_dtype
    return [fault.message for fault in check_train(config)]


@pytest.mark.parametrize(("parts", "message"), MIXTURES)
def test_mixtures(tmp_path, parts, message):
    (found,) = faults(tmp_path, MixtureSettings(parts=parts))
    assert message in found


def test_a_mixture_is_typed_part_by_part():
    arguments = ["loss.parts.dpo.weight=0.8", "loss.parts.simpo={weight:0.2,gamma:0.5}"]
    config = compose_config("config", ["loss=mixture", "model=tiny", *arguments])
    assert config.loss.parts == {"dpo": {"weight": 0.8}, "simpo": {"weight": 0.2, "gamma": 0.5}}


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("robust", {"label_smoothing": 0.5}, "loss.label_smoothing=0.5: must lie in [0, 0.5)"),
        ("exo_pair", {"label_smoothing": 0.0}, "loss.label_smoothing=0.0: must lie in (0, 0.5)"),
        ("aot", {"form": "unpared"}, "loss.form=unpared: no such choice; did you mean unpaired?"),
        ("dpo", {"f_divergence": "jss"}, "loss.f_divergence=jss: no such choice; did you mean js?"),
        ("dpo", {"ld_alpha": 1.5}, "loss.ld_alpha=1.5: must lie in [0, 1]"),
        ("alphapo", {"alpha": 0.0}, "loss.alpha=0.0: must be finite and not 0; write loss=simpo"),
        ("alphapo", {"alpha": math.nan}, "loss.alpha=nan: must be finite and not 0"),
        ("dpop", {"penalty": math.inf}, "loss.penalty=inf: must be 0 or more, and finite"),
        ("simpo", {"gamma": -1.0}, "loss.gamma=-1.0: must be 0 or more"),
    ],
)
def test_values(tmp_path, name, keys, message):
    (found,) = faults(tmp_path, LOSSES[name](**keys))
    assert message in found


@pytest.mark.parametrize(
    ("name", "dataset", "message"),
    [
        ("kto", {}, "loss=kto learns from single answers that are good or bad; write datasets.si.split_pairs=true"),
        ("dpo", {"schema": "unpaired"}, "loss=dpo cannot learn from its single answers; write loss=kto"),
        ("sft", {"schema": "unpaired"}, "loss=sft cannot learn from its single answers; write loss=kto"),
        ("dpo", {"split_pairs": True}, "datasets.si.split_pairs=true: it splits pairs into single answers"),
        ("kto", {"split_pairs": True, "schema": "unpaired"}, "datasets.si.split_pairs=true: it splits pairs"),
    ],
)
def test_rows_of_another_kind(tmp_path, name, dataset, message):
    (found,) = faults(tmp_path, LOSSES[name](), **dataset)
    assert message in found


@pytest.mark.parametrize(("name", "dataset"), [("kto", {"split_pairs": True}), ("kto", {"schema": "unpaired"})])
def test_rows_of_the_right_kind(tmp_path, name, dataset):
    assert faults(tmp_path, LOSSES[name](), **dataset) == []
