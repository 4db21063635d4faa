"""The reference cache: right, found again, shared, and of the rows and weights that it says."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_models import tiny_model
from tests.tiny_runs import random_store, tiny_settings, train_loader
from tests.warm import fork_server
from trainers import reference
from trainers.data.cutters import PaddedCutter
from trainers.distributed.launch import launch
from trainers.kernels.attention import use_packed_attention
from trainers.objectives import PreferenceObjective
from trainers.reference import attach_reference, reference_logps, weights_key


def literal_logps(model, store, row: int) -> list[float]:
    """log pi(chosen|prompt) and log pi(rejected|prompt) of one row, each sequence alone."""
    prompt, *responses = (segment.tolist() for segment in store.row(row))
    sums = []
    for response in responses:
        ids = prompt + response
        log_probabilities = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        sums.append(sum(log_probabilities[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))))
    return sums


def compute(model, store, rows, folder, max_tokens=16_384):
    kept = {}

    def worker(layout):
        kept["logps"] = reference_logps(
            model,
            store,
            rows,
            layout=layout,
            cache_dir=folder,
            weights=weights_key(model),
            cutter=PaddedCutter(0, max_tokens),
        )

    launch(worker, tiny_settings())
    return kept["logps"]


def cached(folder: Path) -> int:
    return len([path for path in (folder / "reference").iterdir() if path.is_dir()])


@pytest.mark.parametrize("max_tokens", [1, 60, 16_384])
def test_values_of_the_visited_rows(tmp_path, max_tokens):
    model = tiny_model(dtype=torch.float64)
    store = random_store(tmp_path, num_rows=11, segments=3)
    rows = torch.tensor([7, 2, 2, 10, 0])
    logps = compute(model, store, rows, tmp_path, max_tokens)
    assert logps.shape == (11, 2)
    assert logps.dtype == torch.float64
    for row in range(11):
        if row in rows.tolist():
            assert logps[row].tolist() == pytest.approx(literal_logps(model, store, row), rel=1e-6)
        else:
            assert all(math.isnan(value) for value in logps[row].tolist())


def test_a_second_run_computes_nothing(tmp_path, monkeypatch):
    store, rows = random_store(tmp_path, num_rows=6, segments=3), torch.arange(6)
    first = compute(tiny_model(), store, rows, tmp_path)
    monkeypatch.setattr(reference, "sequence_logps", None)  # would fail if called
    second = compute(tiny_model(), store, rows.flip(0), tmp_path)
    assert torch.equal(first, second)
    assert cached(tmp_path) == 1


def test_the_key_is_of_weights_rows_and_dtype(tmp_path):
    store, rows = random_store(tmp_path, num_rows=6, segments=3), torch.arange(6)
    compute(tiny_model(), store, rows, tmp_path)
    compute(tiny_model(seed=1), store, rows, tmp_path)
    compute(tiny_model(dtype=torch.bfloat16), store, rows, tmp_path)
    compute(tiny_model(), store, rows[:4], tmp_path)
    compute(tiny_model(), random_store(tmp_path, num_rows=6, segments=3, seed=3), rows, tmp_path)
    assert cached(tmp_path) == 5


def test_the_key_of_the_weights_is_of_what_they_compute(tmp_path):
    model = tiny_model()
    key = weights_key(model)
    model.save_pretrained(tmp_path)
    assert weights_key(type(model).from_pretrained(tmp_path, dtype=torch.float32)) == key
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert weights_key(model) != key
    other = tiny_model()
    other.config.rms_norm_eps = 1e-3
    assert weights_key(other) != key


def test_pages_are_private(tmp_path):
    """A loader that writes into its columns does not reach the file of the other runs."""
    store, rows = random_store(tmp_path, num_rows=6, segments=3), torch.arange(6)
    first = compute(tiny_model(), store, rows, tmp_path)
    kept = first.clone()
    first.zero_()
    assert torch.equal(compute(tiny_model(), store, rows, tmp_path), kept)


def build_in_process(folder: Path, report: Path) -> None:
    torch.set_num_threads(1)
    store = random_store(folder, num_rows=6, segments=3)
    original, calls = reference.sequence_logps, [0]

    def counting(*arguments, **keywords):
        calls[0] += 1
        return original(*arguments, **keywords)

    reference.sequence_logps = counting
    compute(tiny_model(), store, torch.arange(6), folder)
    report.write_text(str(calls[0]))


def test_points_of_a_sweep_build_it_once(tmp_path):
    random_store(tmp_path, num_rows=6, segments=3)
    reports = [tmp_path / f"calls-{i}" for i in range(3)]
    processes = [fork_server().Process(target=build_in_process, args=(tmp_path, report)) for report in reports]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    calls = sorted(int(report.read_text()) for report in reports)
    assert calls[:2] == [0, 0]
    assert calls[2] > 0
    assert cached(tmp_path) == 1


def test_attached_columns_make_the_first_rewards_zero(tmp_path):
    """In batches of other shapes than the cache was built in: ln 2 to 1e-6, rewards to 1e-5 (float32)."""
    settings = tiny_settings(batch_size=5, gradient_accumulation_steps=2)
    loader = train_loader(random_store(tmp_path, num_rows=22, segments=3), settings)
    model = tiny_model()

    def worker(layout):
        if settings.packing:
            use_packed_attention(model)
        attach_reference(model, [loader], layout=layout, cache_dir=tmp_path, weights=weights_key(model))
        objective = PreferenceObjective(settings.loss)
        losses, rewards = [], []
        with torch.no_grad():
            for batch in loader.batches():
                for microbatch in batch.microbatches:
                    output = objective(partial(reference.sequence_logps, model), microbatch)
                    losses.append(output.loss_sum.item())
                    rewards += output.metrics["rewards_{split}/chosen"].tolist()
                    rewards += output.metrics["rewards_{split}/rejected"].tolist()
        assert sum(losses) / 22 == pytest.approx(math.log(2), abs=1e-6)
        assert np.abs(rewards).max() < 1e-5
        assert len(rewards) == 44

    launch(worker, settings)


def test_another_release_or_device_is_another_entry(tmp_path, monkeypatch):
    store, rows = random_store(tmp_path, num_rows=6, segments=3), torch.arange(6)
    compute(tiny_model(), store, rows, tmp_path)
    monkeypatch.setattr(reference.transformers, "__version__", "0.0")
    compute(tiny_model(), store, rows, tmp_path)
    assert cached(tmp_path) == 2
