"""Packed rows against padded ones: the plan, the layout, and the numbers of every architecture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UserError
from tests.test_batching import PAD, make_store
from tests.tiny_models import SUPPORTED, VOCABULARY, tiny_model
from trainers import attention
from trainers.attention import PACKED, PackedLayout, use_packed_attention
from trainers.batching import BatchLoader
from trainers.logps import sequence_logps
from trainers.packing import (
    balanced_shares,
    best_fit,
    collate_packed,
    input_lengths,
    longest_sequence,
    num_positions,
    num_target_tokens,
    num_tokens,
    pack_rows,
)
from trainers.token_store import TokenStore, TokenStoreWriter

# Prompt, chosen, rejected: some longer than Mistral's window of 6, some of one token, which is a target and no input.
PAIRS = [(4, 3, 5), (9, 1, 1), (1, 12, 2), (3, 1, 8), (7, 6, 1)]


def store_of(folder, shapes, seed=0) -> TokenStore:
    """Rows of random tokens with these lengths."""
    generator = torch.Generator().manual_seed(seed)
    with TokenStoreWriter(folder, key=f"{shapes} {seed}", num_segments=len(shapes[0])) as writer:
        for i, shape in enumerate(shapes):
            writer.append(f"row-{i}", [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in shape])
        writer.finish({})
    return TokenStore(folder)


def microbatch(store, *, packing):
    """All rows of a store, in its order."""
    loader = BatchLoader(
        store, batch_size=len(store), seed=0, shuffle=False, num_epochs=1, num_examples=None, num_microbatches=1,
        max_tokens_per_microbatch=None, pad_token_id=PAD, packing=packing,
    )  # fmt: skip
    return loader._collate(torch.arange(len(store)))


def exact_model(name="llama", *, dtype=torch.float64):
    """In float64, norms included: those of the Llama family round to float32 inside, and so do their gradients."""
    model = tiny_model(name, dtype=dtype)
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if dtype == torch.float64 and type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=dtype)
                norm.weight.data.copy_(child.weight.data)
                setattr(module, key, norm)
    return model


def packed_model(name="llama", *, dtype=torch.float64):
    model = exact_model(name, dtype=dtype)
    use_packed_attention(model)
    return model


def logps_and_gradients(model, batch):
    """Log-probabilities, and the gradients of a weighted sum of them by name."""
    logps, num_targets = sequence_logps(model, batch)
    weights = torch.linspace(-1, 2, logps.numel(), dtype=torch.float64).view(logps.shape)
    model.zero_grad()
    (logps * weights).sum().backward()
    return logps.detach(), num_targets, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("segments", [3, 2])
@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_probabilities_and_gradients_equal_the_padded_ones(tmp_path, name, dtype, segments):
    store = store_of(tmp_path / "store", [shape[:segments] for shape in PAIRS])
    padded, packed = microbatch(store, packing=False), microbatch(store, packing=True)
    expected, expected_counts, truth = logps_and_gradients(exact_model(name, dtype=dtype), padded)
    logps, counts, gradients = logps_and_gradients(packed_model(name, dtype=dtype), packed)
    assert torch.equal(counts, expected_counts)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logps, expected, rtol=tolerance, atol=tolerance)
    for key, gradient in gradients.items():
        scale = truth[key].abs().max().item()
        torch.testing.assert_close(gradient, truth[key], rtol=tolerance, atol=tolerance * scale, msg=key)
