"""The loss of a global batch, its gradient and its metrics do not depend on how the batch is cut or ordered."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from config.settings import LOSSES as SETTINGS
from config.settings import DPOSettings, IPOSettings, MixtureSettings, TrainConfig
from tests.tiny_models import tiny_model
from tests.tiny_runs import random_store, segments_of, tiny_settings
from trainers.data.batching import BatchLoader
from trainers.data.cutters import PaddedCutter, build_cutter
from trainers.distributed.launch import launch
from trainers.kernels.attention import use_packed_attention
from trainers.kernels.logps import sequence_logps
from trainers.losses.lengths import ld_alpha_of
from trainers.objectives import LikelihoodObjective, build_objective
from trainers.objectives.output import add_metrics
from trainers.reference import MovingReference, attach_reference
from trainers.run.metrics import MetricSums
from trainers.trainer import Trainer

ROWS = 9
LOSSES = {
    **{name: kind() for name, kind in SETTINGS.items() if name != "mixture"},
    "dpo and likelihood": DPOSettings(beta=0.5, nll_weight=0.3),
    "ipo per token": IPOSettings(average_logps=True),
    "aot unpaired": SETTINGS["aot"](form="unpaired"),
    "wpo": DPOSettings(wpo="sampled"),
    "ld": DPOSettings(ld_alpha=0.4, average_logps=True, f_divergence="js"),
    "mixture": MixtureSettings(parts={"dpo": {"weight": 0.8}, "aot": {"weight": 0.3}, "bco_pair": {}, "simpo": {}}),
}


def step(folder, loss, *, seed, num_microbatches, max_tokens=None, reverse_rows=False, packing=False):
    """Gradient (flat) and metrics of one global batch of all rows, cut and ordered as told."""
    store = random_store(folder, num_rows=ROWS, segments=segments_of(loss), judged=loss.rows == "answers", seed=5)
    if reverse_rows:
        store = store.select(torch.arange(ROWS).flip(0))
    cutter = build_cutter(
        packing=packing, device=torch.device("cpu"), pad_token_id=0, max_tokens=max_tokens,
        num_microbatches=num_microbatches,
    )  # fmt: skip
    loader = BatchLoader(store, cutter, batch_size=ROWS, seed=seed)
    result = {}

    def worker(layout):
        model = tiny_model()
        objective = build_objective(loss)
        if objective.needs_reference:  # another model's, so that there is something to prefer
            other = tiny_model(seed=1)
            if packing:
                use_packed_attention(other)
            attach_reference(
                other, [loader], layout=layout, cache_dir=folder / "cache", weights="seed 1", ld_alpha=ld_alpha_of(loss)
            )
        # The step's own method on a bare trainer: what is tested is its sum over micro-batches.
        trainer = Trainer.__new__(Trainer)
        if packing:
            use_packed_attention(model)
        trainer.objective, trainer.policy, trainer.layout = objective, model, layout
        trainer.settings = TrainConfig(exp_name="bare")
        trainer.reference = MovingReference(model, trainer.settings, layout)
        trainer.logps_of = partial(sequence_logps, model)
        (batch,) = loader.batches()
        batch = replace(batch, start_examples=ROWS)  # not the first one, whose loss is known
        num_units = sum(map(objective.num_units, batch.microbatches))
        outputs, loss_sum = trainer.accumulate_gradients(batch, num_units)
        sums = MetricSums()
        add_metrics(sums, "train", outputs, loss_sum, num_units)
        result["gradient"] = torch.cat([p.grad.flatten() for p in model.parameters()])
        result["metrics"] = sums.means()
        result["sizes"] = [len(microbatch["row"]) for microbatch in batch.microbatches]

    launch(worker, tiny_settings())
    return result


CUT_ALL_WAYS = ("dpo and likelihood", "reverse", "aot", "kto")  # one of each kind
CUTS = ("one by one", "three", "packed", "packed, by tokens")  # of the others


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_and_order_change_nothing(tmp_path, name):
    loss = LOSSES[name]
    whole = step(tmp_path, loss, seed=0, num_microbatches=1)
    assert whole["sizes"] == [ROWS]
    cuts = {
        "one by one": {"seed": 0, "num_microbatches": ROWS},
        "three": {"seed": 0, "num_microbatches": 3},
        "four, uneven": {"seed": 0, "num_microbatches": 4},
        "by tokens": {"seed": 0, "num_microbatches": 1, "max_tokens": 40},
        "another order": {"seed": 3, "num_microbatches": 3},
        "rows reversed": {"seed": 0, "num_microbatches": 2, "reverse_rows": True},
        "packed": {"seed": 0, "num_microbatches": 1, "packing": True},
        "packed, in three": {"seed": 1, "num_microbatches": 3, "packing": True},
        "packed, by tokens": {
            "seed": 2,
            "num_microbatches": 1,
            "max_tokens": 30,
            "packing": True,
            "reverse_rows": True,
        },
    }
    if name not in CUT_ALL_WAYS:
        cuts = {way: cuts[way] for way in CUTS}
    for way, cut in cuts.items():
        other = step(tmp_path, loss, **cut)
        assert (other["sizes"] == [ROWS]) == (way == "packed"), way
        difference = (other["gradient"] - whole["gradient"]).norm() / whole["gradient"].norm()
        assert difference < 2e-6, (way, difference)  # float32 sums in another order
        assert other["metrics"].keys() == whole["metrics"].keys()
        for metric, value in whole["metrics"].items():
            assert other["metrics"][metric] == pytest.approx(value, rel=1e-6, abs=1e-6), (way, metric)


def test_a_mean_of_means_would_fail_this(tmp_path):
    """The negative control: averaging micro-batch means, as most trainers do, is another gradient."""
    loss = LOSSES["reverse"]
    whole = step(tmp_path, loss, seed=0, num_microbatches=1)
    store = random_store(tmp_path, num_rows=ROWS, segments=2, seed=5)
    loader = BatchLoader(store, PaddedCutter(pad_token_id=0, num_microbatches=4), batch_size=ROWS, seed=0)
    model, objective = tiny_model(), LikelihoodObjective(loss)
    (batch,) = loader.batches()
    for microbatch in batch.microbatches:
        (
            objective(partial(sequence_logps, model), microbatch).loss_sum / objective.num_units(microbatch) / 4
        ).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - whole["gradient"]).norm() / whole["gradient"].norm() > 1e-2
