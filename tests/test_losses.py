"""Losses against a literal float64 reading of the papers, one pair at a time, and against finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.losses import dpo_loss, ipo_loss, reward_accuracy

LOGP = st.floats(-300, 0, allow_nan=False)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return min(x, 0) - math.log1p(math.exp(-abs(x)))


@settings(max_examples=200, deadline=None)
@given(LOGP, LOGP, LOGP, LOGP, st.floats(0.01, 1), st.floats(0, 0.49), st.booleans())
def test_dpo_is_equation_7(pw, pl, rw, rl, beta, smoothing, reference_free):
    if reference_free:
        rw = rl = 0.0
    losses, chosen, rejected = dpo_loss(
        *(torch.tensor([v], dtype=torch.float64) for v in (pw, pl, rw, rl)), beta=beta, label_smoothing=smoothing
    )
    h = beta * (pw - rw) - beta * (pl - rl)
    expected = -(1 - smoothing) * log_sigmoid(h) - smoothing * log_sigmoid(-h)
    assert losses.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert chosen.item() == pytest.approx(beta * (pw - rw), abs=1e-9)
    assert rejected.item() == pytest.approx(beta * (pl - rl), abs=1e-9)


@settings(max_examples=200, deadline=None)
@given(LOGP, LOGP, LOGP, LOGP, st.floats(0.01, 1))
def test_ipo_is_equation_17(pw, pl, rw, rl, tau):
    losses, chosen, rejected = ipo_loss(*(torch.tensor([v], dtype=torch.float64) for v in (pw, pl, rw, rl)), beta=tau)
    assert losses.item() == pytest.approx(((pw - pl) - (rw - rl) - 1 / (2 * tau)) ** 2, rel=1e-6)
    assert chosen.item() == pytest.approx(tau * (pw - rw), abs=1e-9)
    assert rejected.item() == pytest.approx(tau * (pl - rl), abs=1e-9)


def test_dpo_gradient_is_the_one_of_the_paper():
    """Rafailov et al., section 4: d loss / d log pi(y_w) = -beta sigmoid(r_l - r_w), and its negative for y_l."""
    generator = torch.Generator().manual_seed(0)
    pw, pl, rw, rl = (-50 * torch.rand(6, dtype=torch.float64, generator=generator) for _ in range(4))
    pw.requires_grad_()
    pl.requires_grad_()
    losses, chosen, rejected = dpo_loss(pw, pl, rw, rl, beta=0.1)
    losses.sum().backward()
    expected = torch.tensor([-0.1 * sigmoid(float(low - high)) for high, low in zip(chosen, rejected, strict=True)])
    torch.testing.assert_close(pw.grad, expected.double(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(pl.grad, -expected.double(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("reference_free", [False, True])
def test_gradients_equal_finite_differences(reference_free):
    generator = torch.Generator().manual_seed(1)
    vectors = [(-5 * torch.rand(4, dtype=torch.float64, generator=generator)).requires_grad_() for _ in range(4)]
    if reference_free:
        vectors[2:] = [torch.zeros_like(vector) for vector in vectors[2:]]

    def dpo(*v):
        return dpo_loss(*v, beta=0.3, label_smoothing=0.1)[0]

    def ipo(*v):
        return ipo_loss(*v, beta=0.3)[0]

    assert torch.autograd.gradcheck(dpo, vectors, atol=1e-6)
    assert torch.autograd.gradcheck(ipo, vectors, atol=1e-6)


def test_float32_stays_near_float64():
    generator = torch.Generator().manual_seed(2)
    exact = [-300 * torch.rand(64, dtype=torch.float64, generator=generator) for _ in range(4)]
    single = [vector.float() for vector in exact]
    torch.testing.assert_close(
        dpo_loss(*single, beta=0.1)[0].double(), dpo_loss(*exact, beta=0.1)[0], rtol=1e-4, atol=1e-4
    )


def test_losses_stay_finite_far_out():
    far = torch.tensor([1e5], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    losses, _, _ = dpo_loss(-far, zero, zero, zero, beta=1.0)
    assert losses.item() == pytest.approx(1e5)
    assert dpo_loss(far, zero, zero, zero, beta=1.0)[0].item() == 0.0


def test_a_tie_is_half_right():
    accuracy = reward_accuracy(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert accuracy.tolist() == [1.0, 0.0, 0.5]
