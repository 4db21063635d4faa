"""Sequence log-probabilities against `model(...).logits` of each sequence alone, in float64."""

from types import SimpleNamespace

import pytest
import torch

from config.errors import UserError
from tests.tiny_models import SUPPORTED, VOCABULARY, tiny_model
from trainers.kernels import logps as logps_module
from trainers.kernels.head_check import check_head
from trainers.kernels.logps import sequence_logps

LENGTHS = torch.tensor([9, 14, 5, 13])
PROMPT = torch.tensor([3, 6, 1, 12])


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four right-padded sequences of unequal length; padding is id 0, which occurs as a token, too."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.arange(int(LENGTHS.max()))
    mask = positions < LENGTHS[:, None]
    ids = torch.randint(0, VOCABULARY, mask.shape, generator=generator) * mask
    return ids, mask, mask & (positions >= PROMPT[:, None])


def logps_of(model, ids, mask, response):
    """`sequence_logps` of a batch given by its tensors."""
    return sequence_logps(model, {"input_ids": ids, "attention_mask": mask, "response_mask": response})


def closed_form(model, ids, response_mask) -> torch.Tensor:
    """sum_t log softmax(logits_(t-1))[token_t], one unpadded sequence at a time."""
    sums = []
    for row, length in enumerate(LENGTHS.tolist()):
        logits = model(ids[row : row + 1, :length], use_cache=False).logits[0].double()
        probabilities = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
        targets = [t for t in range(length) if response_mask[row, t]]
        sums.append(sum(torch.log(probabilities[t - 1, ids[row, t]]) for t in targets))
    return torch.stack(sums)


@pytest.mark.parametrize("name", SUPPORTED)
def test_values_and_gradients_equal_the_full_logits(name):
    model = tiny_model(name, dtype=torch.float64)
    ids, mask, response = batch()
    check_head(model)
    logps, num_tokens = logps_of(model, ids, mask, response)
    expected = closed_form(model, ids, response)
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-9)
    assert num_tokens.tolist() == (LENGTHS - PROMPT).tolist()

    weights = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((logps * weights).sum(), parameters)
    # GPT-J attends in float32 whatever its weights are.
    tolerance = 1e-4 if name == "gptj" else 1e-6
    for gradient, truth in zip(gradients, torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        # Relative to the largest entry: several families normalise in float32 and leave its noise in small ones.
        torch.testing.assert_close(gradient, truth, rtol=tolerance, atol=tolerance * truth.abs().max().item())


@pytest.mark.parametrize("name", SUPPORTED)
def test_float32_stays_within_1e_4(name):
    ids, mask, response = batch(1)
    exact, _ = logps_of(tiny_model(name, dtype=torch.float64), ids, mask, response)
    single, _ = logps_of(tiny_model(name), ids, mask, response)
    assert single.dtype == torch.float64  # the sum is, whatever the weights are
    torch.testing.assert_close(single, exact, rtol=1e-5, atol=1e-4)


def test_leading_dimensions_are_kept():
    model = tiny_model(dtype=torch.float64)
    ids, mask, response = batch()
    flat, flat_tokens = logps_of(model, ids, mask, response)
    pairs, tokens = logps_of(model, *(x.view(2, 2, -1) for x in (ids, mask, response)))
    torch.testing.assert_close(pairs, flat.view(2, 2))
    assert tokens.tolist() == flat_tokens.view(2, 2).tolist()


def test_padding_and_company_change_nothing():
    model = tiny_model(dtype=torch.float64)
    ids, mask, response = batch()
    wide = [torch.nn.functional.pad(x, (0, 7)) for x in (ids, mask, response)]
    wide[0][~wide[1]] = 33  # any token may fill
    together, _ = logps_of(model, *wide)
    alone = torch.cat([logps_of(model, *(x[i : i + 1] for x in (ids, mask, response)))[0] for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_a_sequence_without_targets_is_zero_and_takes_no_gradient():
    model = tiny_model(dtype=torch.float64)
    ids, mask, response = batch()
    response[2] = False
    logps, num_tokens = logps_of(model, ids, mask, response)
    assert (logps[2].item(), num_tokens[2].item()) == (0.0, 0)
    none, _ = logps_of(model, ids, mask, torch.zeros_like(mask))
    none.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_first_token_is_never_a_target():
    model = tiny_model(dtype=torch.float64)
    ids, mask, response = batch()
    with_first = response.clone()
    with_first[:, 0] = True
    torch.testing.assert_close(logps_of(model, ids, mask, with_first), logps_of(model, ids, mask, response))


def test_long_sums_do_not_lose_digits():
    """500 tokens in float32: the sum is as good as its terms, far from the 1e-3 of a float32 running sum."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (1, 500), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    logps, _ = logps_of(model, ids, mask, mask)
    log_softmax = model(ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
    expected = log_softmax.double().gather(1, ids[0, 1:, None]).sum()
    assert logps.item() == pytest.approx(expected.item(), abs=2e-4)


def test_a_head_that_is_more_than_a_projection_is_refused():
    """Log-probabilities from the projection alone are wrong for Granite, and small logits would not show it."""
    model = tiny_model("granite", dtype=torch.float64)
    ids, mask, response = batch()
    logps, _ = logps_of(model, ids, mask, response)
    assert (logps - closed_form(model, ids, response)).abs().max() > 1e-3
    with pytest.raises(UserError, match="after the output embedding"):
        check_head(model)


def test_the_check_leaves_the_model_as_it_was():
    model = tiny_model().train()
    ids, mask, response = batch()
    before = logps_of(model, ids, mask, response)[0]
    check_head(model)
    assert model.training
    torch.testing.assert_close(logps_of(model, ids, mask, response)[0], before, rtol=0, atol=0)


def test_a_head_in_parts_changes_nothing(monkeypatch):
    """A limit of 3 rows at a time: values and gradients are those of all rows at once."""
    results = []
    for limit in (1 << 28, 3 * VOCABULARY):
        monkeypatch.setattr(logps_module, "MAX_LOGITS", {"cpu": limit})
        model = tiny_model()
        logps, _ = logps_of(model, *batch())
        logps.sum().backward()
        results.append((logps.detach(), [parameter.grad for parameter in model.parameters()]))
    (whole, gradients), (parts, gradients_of_parts) = results
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients_of_parts, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())


def test_gradients_of_the_token_log_probabilities_are_those_of_finite_differences():
    """States, weight and bias; all logits kept, and made again part by part."""
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((7, 3), (11, 3), (11,))
    )
    targets = torch.randint(0, 11, (7,), generator=generator)

    def logps(states, weight, bias):
        head = SimpleNamespace(weight=weight, bias=bias)
        return logps_module.token_logps(head, states, targets)

    assert torch.autograd.gradcheck(logps, (states, weight, bias))
    expected = (states @ weight.T + bias).log_softmax(-1)[torch.arange(7), targets]
    torch.testing.assert_close(logps(states, weight, bias), expected, rtol=1e-12, atol=1e-12)


def test_a_second_backward_pass_is_right(monkeypatch):
    """The first one overwrites what the forward pass kept."""
    head = torch.nn.Linear(3, 11)
    states = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    logps = logps_module.token_logps(head, states, torch.arange(5))
    first, second = (torch.autograd.grad(logps.sum(), head.weight, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)


def test_improbable_tokens_keep_their_digits():
    """A probability that float32 cannot hold: its logarithm is finite."""
    head = torch.nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [-200.0]]))
    assert logps_module.token_logps(head, torch.ones(1, 1), torch.tensor([1])).item() == -200.0


def test_an_output_embedding_that_is_more_than_a_matrix_is_refused():
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(UserError, match="more than a matrix"):
        check_head(model)


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_gpu_computes_the_same_from_its_logits(with_bias):
    """Its two passes, uncompiled, against autograd: the logits stay for the second one, which overwrites them."""
    generator = torch.Generator().manual_seed(2)
    logits = 30 * torch.randn(7, 11, generator=generator, dtype=torch.float64)
    bias = torch.randn(11, generator=generator, dtype=torch.float64) if with_bias else None
    targets = torch.randint(0, 11, (7,), generator=generator)
    gradient = torch.randn(7, 1, generator=generator, dtype=torch.float64)
    inputs = logits.clone().requires_grad_()
    expected = (inputs if bias is None else inputs + bias).log_softmax(-1)[torch.arange(7), targets]
    expected.backward(gradient[:, 0])
    buffer = torch.zeros(7, 64, dtype=torch.float64)[:, :11].copy_(logits)
    normaliser, logps = logps_module._normalise(buffer, bias, targets)
    assert torch.equal(buffer, logits)
    torch.testing.assert_close(logps, expected.detach(), rtol=1e-12, atol=1e-12)
    logps_module._overwrite_by_gradient(buffer, bias, normaliser, targets, gradient)
    torch.testing.assert_close(buffer, inputs.grad, rtol=1e-12, atol=1e-12)


def test_parts_of_many_rows_are_whole_tiles(monkeypatch):
    """523 rows of 128,256 tokens would fit: the last 11 of them would cost a tile of their own."""
    states, targets, weight = torch.empty(1100, 1), torch.empty(1100), torch.empty(128_256, 1)
    assert [len(rows) for rows, _ in logps_module._parts(states, targets, weight)] == [512, 512, 76]
    monkeypatch.setattr(logps_module, "MAX_LOGITS", {"cpu": 3 * 128_256})
    assert {len(rows) for rows, _ in logps_module._parts(states, targets, weight)} <= {3, 2}
