"""Rates of a step against numbers written out by hand."""

import pytest
import torch

from tests.test_batching import loader, make_store
from tests.tiny_models import tiny_model
from tests.tiny_runs import tiny_settings
from trainers.distributed.launch import launch
from trainers.distributed.layout import Layout
from trainers.run import speed
from trainers.run.metrics import MetricSums


@pytest.mark.parametrize("packing", [False, True])
def test_rates_and_both_shares_of_the_peak(tmp_path, monkeypatch, packing):
    """A GPU of 1,000 FLOP/s, a step of 4 s after a wait of 1 s: blocks at every position, the head at targets."""
    monkeypatch.setattr(speed, "peak_flops", lambda device: 1000.0)
    store, model = make_store(tmp_path / "store", 5), tiny_model()
    (batch,) = loader(store, num_epochs=1, packing=packing).batches()
    lengths = store.lengths
    tokens = int((2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]).sum())
    targets = int(lengths[:, 1:].sum())
    positions = tokens - int(lengths[:, 0].sum()) - 10  # a prompt once, and no response's last token
    if not packing:
        positions = 10 * int((lengths[:, 0] + lengths[:, 1:].amax(1)).max())
    head = model.get_output_embeddings().weight.numel()
    embedding = model.get_input_embeddings().weight.numel()
    blocks = sum(parameter.numel() for parameter in model.parameters()) - head - embedding
    assert head == embedding
    means = {}

    def worker(layout):
        sums = MetricSums()
        two = Layout(rank=0, world_size=2, device=torch.device("cpu"))
        speed.Speed(model, two).add(sums, batch, step_seconds=4.0, wait_seconds=1.0)
        means.update(sums.means())

    launch(worker, tiny_settings())
    assert means.pop("memory/peak") > 0
    assert means == pytest.approx(
        {
            "examples_per_second": 1.0,
            "tokens_per_second": 2 * tokens / 5,
            "data_wait_seconds": 1.0,
            "mfu": 6 * blocks * positions / 1000 / 5,
            "mfu_with_head": 6 * (blocks * positions + head * targets) / 1000 / 5,
        },
        rel=1e-12,
    )
