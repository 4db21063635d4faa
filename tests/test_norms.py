"""RMS norms in fewer passes, against torch's own and by finite differences."""

import copy

import pytest
import torch

from tests.tiny_models import tiny_model
from trainers.kernels.shortcuts import rms_norm, use_fast_norms


def test_value_and_gradients_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(2, 7, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(16, generator=generator, dtype=torch.float64)
    results = []
    for norm in (rms_norm, lambda x, weight, eps: torch.nn.functional.rms_norm(x, (16,), weight, eps)):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        output = norm(*inputs, 0.1)
        output.backward(gradient)
        results.append([output.detach(), *(one.grad for one in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    x, weight = x[0, :3].clone().requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 0.1), (x, weight))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2_tied"])
def test_models_compute_the_same_with_them(name):
    model = tiny_model(name)
    fast = copy.deepcopy(model)
    use_fast_norms(fast)
    norms = [module for module in fast.modules() if "forward" in vars(module)]
    assert len(norms) == 5
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for one in (model, fast, copy.deepcopy(fast)):
        one.zero_grad()
        logits = one(ids).logits
        logits.square().mean().backward()
        results.append([logits.detach(), *(parameter.grad for parameter in one.parameters())])
    for plain, ours, copied in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
        assert torch.equal(copied, ours)
    assert not all(torch.equal(plain, ours) for plain, ours in zip(*results[:2], strict=True))  # they were used


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_neox", "gptj"])
def test_other_norms_stay(name):
    """Gemma's multiplies by 1 + weight; the others are layer norms."""
    model = tiny_model(name)
    use_fast_norms(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_another_dtype_is_left_to_the_model():
    """In bfloat16 transformers rounds between the two products, in float64 it computes in float32."""
    for dtype in (torch.bfloat16, torch.float64):
        model = tiny_model(dtype=dtype)
        fast = copy.deepcopy(model)
        use_fast_norms(fast)
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(fast(ids).logits, model(ids).logits)


def test_a_norm_that_takes_a_gate_is_left_to_the_model():
    """As in models with linear attention: it has a weight and an epsilon, too, but is called with two tensors."""

    class GatedNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x, gate):
            normed = torch.nn.functional.rms_norm(x, (8,), self.weight, self.variance_epsilon)
            return normed * torch.nn.functional.silu(gate)

    model = torch.nn.Sequential(GatedNorm())
    use_fast_norms(model)
    assert "forward" not in vars(model[0])
