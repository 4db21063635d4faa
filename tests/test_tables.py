"""Gradients of the embeddings that are added in place, against those that autograd adds up."""

import pytest
import torch

from tests.test_packing import PAD, PAIRS, microbatch, packed_model, store_of
from tests.tiny_models import PACKABLE
from trainers.kernels import shortcuts as tables
from trainers.kernels.logps import sequence_logps


@pytest.mark.parametrize("name", [one for one in PACKABLE if one.values[0] in ("llama", "qwen2_tied", "gpt2", "gptj")])
def test_gradients_of_two_micro_batches_are_those_of_autograd(tmp_path, name):
    """One embedding for input and output, a bias, positions of their own; a token that is the padding elsewhere."""
    batches = [microbatch(store_of(tmp_path / str(seed), PAIRS, seed), packing=True) for seed in (0, 1)]
    model = packed_model(name)
    table = model.get_input_embeddings()
    table.padding_idx = int(batches[0]["input_ids"][0])
    results = []
    for add_to_grad in (False, True):
        model.zero_grad()
        for batch in batches:
            logps, _ = sequence_logps(model, batch, add_to_grad=add_to_grad)
            (logps * torch.tensor([1.0, -2.0], dtype=torch.float64)).sum().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for plain, added in zip(*results, strict=True):
        torch.testing.assert_close(added, plain, rtol=1e-12, atol=1e-12 * plain.abs().max().item())
    if model.get_output_embeddings().weight is not table.weight:
        assert not table.weight.grad[table.padding_idx].any()


def test_the_second_gradient_is_added_in_place_unless_a_hook_waits_for_it(tmp_path, monkeypatch):
    batch = microbatch(store_of(tmp_path / "store", PAIRS), packing=True)
    model = packed_model()
    weights = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    added = []

    def spy(weight, so_far=tables.gradient_so_far):
        gradient = so_far(weight)
        added.append((id(weight), gradient is not None))
        return gradient

    monkeypatch.setattr(tables, "gradient_so_far", spy)
    monkeypatch.setattr("trainers.kernels.logps.gradient_so_far", spy)
    for _ in range(2):
        sequence_logps(model, batch, add_to_grad=True)[0].sum().backward()
    assert {weight for weight, _ in added} == weights
    assert [in_place for _, in_place in added] == [False, False, True, True]
    seen = []
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        weight.register_hook(seen.append)
    sequence_logps(model, batch, add_to_grad=True)[0].sum().backward()
    assert len(seen) == 2
    assert all(gradient is not None for gradient in seen)


def test_embeddings_that_do_more_are_left_to_the_model():
    ids = torch.tensor([3, 4])
    plain = torch.nn.Embedding(9, 4, padding_idx=PAD)
    assert torch.equal(tables.embed(plain, ids), plain(ids))
    scaled = type("Scaled", (torch.nn.Embedding,), {"forward": lambda self, ids: 2 * super().forward(ids)})(9, 4)
    assert tables.embed(scaled, ids) is None
    assert tables.embed(torch.nn.Embedding(9, 4, max_norm=1.0), ids) is None


def test_equal_backward_passes_give_equal_bytes_with_two_threads():
    """`index_put_` adds in any order on a CPU; the sums are also compared with those of float64."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (4000,), generator=generator)
    gradient = torch.randn(4000, 64, generator=generator)
    truth = torch.zeros(40, 64, dtype=torch.float64).index_add_(0, ids, gradient.double())
    table = torch.nn.Embedding(40, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = set()
        for _ in range(20):
            table.zero_grad()
            for part in range(2):  # the first gradient is made, the second is added to it
                half = slice(2000 * part, 2000 * (part + 1))
                tables.embed(table, ids[half]).backward(gradient[half])
            results.add(table.weight.grad.numpy().tobytes())
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1
    torch.testing.assert_close(table.weight.grad.double(), truth, rtol=1e-4, atol=1e-4)
