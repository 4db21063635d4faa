"""A world of one prompt and a few answers, whose softmax policy each loss moves to an optimum that is known.

The optima of the first test are solved by hand from the mean loss over preferences both ways, and compared with the
smallest of a fine grid. The others follow the gradient from the reference.
"""

import math

import pytest
import torch

from config.settings import LOSSES
from trainers.losses import ANSWER_LOSSES, PAIR_LOSSES
from trainers.losses.responses import Answers, Pairs

P, B, E = 0.8, 0.5, 0.2  # the first answer is better with this probability; beta; share of flipped labels


def logit(p: float) -> float:
    return math.log(p / (1 - p))


FLIPPED = (1 - E) * P + E * (1 - P)
# Name -> keys, how often the first answer is labelled as chosen, h = a - b at the optimum
OPTIMA = {
    "dpo": ({}, P, logit(P) / B),  # sigmoid(b h) = P
    "cdpo": ({"label_smoothing": E}, P, logit(FLIPPED) / B),  # as if labels were flipped once more
    "robust": ({"label_smoothing": E}, FLIPPED, logit(P) / B),  # from flipped labels, the optimum of the true ones
    "ipo": ({}, P, (2 * P - 1) / (2 * B)),  # P (h - 1/2b) + (1 - P) (h + 1/2b) = 0
    "hinge": ({}, P, 1 / B),  # at the kink, as P > 1/2
    "exo_pair": ({"label_smoothing": E}, 1.0, logit(1 - E) / B),  # the KL is 0
    "dpo_norm": ({}, P, logit(P) / B),
    "cpo": ({}, P, logit(P) / B),  # of the policy alone: the reference is uniform
}


@pytest.mark.parametrize("name", OPTIMA)
def test_the_margin_at_the_optimum(name):
    keys, probability, expected = OPTIMA[name]
    h = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
    policy = torch.log_softmax(torch.stack([h, torch.zeros_like(h)], dim=-1), dim=-1)
    reference = torch.full_like(policy, -math.log(2))
    loss = LOSSES[name](beta=B, **keys)
    one, other = (PAIR_LOSSES[name](Pairs(p, reference), loss) for p in (policy, policy.flip(-1)))
    best = h[(probability * one + (1 - probability) * other).argmin()].item()
    assert best == pytest.approx(expected, abs=2e-4)


def descend(loss_of, steps=400, lr=0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities of three answers before (uniform) and after following the gradient of the logits."""
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    reference = torch.log_softmax(theta.detach(), dim=-1)
    optimizer = torch.optim.SGD([theta], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(torch.log_softmax(theta, dim=-1), reference).backward()
        optimizer.step()
    return reference, torch.log_softmax(theta.detach(), dim=-1)


@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "discopop"])
def test_chosen_gains_on_rejected(name):
    """The first answer is always chosen, the second rejected, the third never seen."""

    def loss_of(policy, reference):
        pairs = Pairs(policy[None, :2], reference[None, :2])
        return PAIR_LOSSES[name](pairs, LOSSES[name](**({"penalty": 0.5} if name == "dpop" else {}))).sum()

    reference, policy = descend(loss_of)
    assert policy[0] - policy[1] > 0.1
    assert policy[1] < reference[1]
    assert policy[0] > reference[0]
    # apo_down pushes chosen down, too: what gains most is the answer that was never seen.
    assert (policy[2] > policy[0]) == (name == "apo_down")


def test_discopop_begins_by_lowering_the_margin():
    """Its slope at z = 0 is (1 - log 2) / (4 tau) - 3/4 > 0 for tau = 0.05: not convex, as its paper says."""
    policy = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    loss = PAIR_LOSSES["discopop"](Pairs(policy, torch.zeros_like(policy)), LOSSES["discopop"](beta=1.0))
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert gradient[0, 0].item() == pytest.approx((1 - math.log(2)) / (4 * 0.05) - 0.75)
    far = torch.tensor([[0.5, 0.0], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    losses = PAIR_LOSSES["discopop"](Pairs(far, torch.zeros_like(far)), LOSSES["discopop"](beta=1.0))
    (gradient,) = torch.autograd.grad(losses.sum(), far)
    assert (gradient[:, 0] < 0).all(), "away from 0 it raises the margin, on either side"


@pytest.mark.parametrize("name", ANSWER_LOSSES)
def test_good_answers_gain_and_bad_ones_lose(name):
    def loss_of(policy, reference):
        answers = Answers((policy - reference)[:2], torch.tensor([True, False]), torch.tensor(0.0))
        return ANSWER_LOSSES[name](answers, LOSSES[name]()).sum()

    _, policy = descend(loss_of)
    assert policy[0] > policy[2] > policy[1]
