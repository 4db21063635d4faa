"""A world of one prompt and a few answers, whose softmax policy each loss moves to an optimum that is known.

The optima of the first two tests are solved by hand from the mean loss over preferences both ways, and compared with
the smallest of a fine grid, or with where a minimiser ends. The others, which have no end, follow the gradient from the
reference.
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
G = 0.6  # margin of the rewards
# The mean loss of a reward difference d with margin g is -P ls(d - g) - (1 - P) ls(-d - g): least where, with x = e^d,
# (1 - P) x^2 - e^g (2P - 1) x - P = 0
WITH_MARGIN = math.log(
    (math.exp(G) * (2 * P - 1) + math.sqrt(math.exp(2 * G) * (2 * P - 1) ** 2 + 4 * P * (1 - P))) / (2 * (1 - P))
)


# alphapo's difference where the policy is (sigmoid(h), sigmoid(-h)) is b (sigmoid(-h)^-c - sigmoid(h)^-c) / c, c = 1/4
ALPHAPO = min(
    (i / 10_000 for i in range(60_000)),
    key=lambda h: abs(4 * B * ((1 + math.exp(h)) ** 0.25 - (1 + math.exp(-h)) ** 0.25) - WITH_MARGIN),
)
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
    "rpo": ({}, P, logit(P) / B),  # its likelihood term is the objective's
    "aot": ({}, P, logit(P) / B),  # one pair
    "orpo": ({}, P, logit(P) / 2),  # the odds of one are those of the other, inverted: their difference is 2h
    "slic": ({"likelihood_weight": 0.4}, P, B),  # at the kink: P - sigmoid(b) < (1 - P) / 0.4
    "simpo": ({"gamma": G}, P, WITH_MARGIN / B),
    "alphapo": ({"gamma": G, "alpha": 0.25}, P, ALPHAPO),
}
# Name -> a and b at the optimum: in a world of three answers neither says what the other is.
OPTIMA_OF_BOTH = {
    "nca_pair": (math.log(2 * P) / B, math.log(2 * (1 - P)) / B),  # sigmoid(b a) = P / (P + 1/2)
    "sppo_hard": ((2 * P - 1) / (2 * B), (1 - 2 * P) / (2 * B)),  # P (a - 1/2b) + (1 - P) (a + 1/2b) = 0
    "bco_pair": ((logit(P) - 1) / B, (-logit(P) - 1) / B),  # sigmoid(b a - delta) = P, delta = -1
}
WITHOUT_END = ("discopop", "apo_zero", "apo_down", "dpop")  # chosen over rejected for ever, though more and more slowly


def test_the_optimum_of_every_loss_is_stated():
    assert {*OPTIMA, *OPTIMA_OF_BOTH, *WITHOUT_END} == set(PAIR_LOSSES)


@pytest.mark.parametrize("name", OPTIMA)
def test_the_margin_at_the_optimum(name):
    keys, probability, expected = OPTIMA[name]
    h = torch.linspace(-6, 6, 120_001, dtype=torch.float64)
    policy = torch.log_softmax(torch.stack([h, torch.zeros_like(h)], dim=-1), dim=-1)
    reference = torch.full_like(policy, -math.log(2))
    loss = LOSSES[name](beta=B, **keys)
    of_one = torch.vmap(lambda p, r: PAIR_LOSSES[name](Pairs(p[None], r[None]), loss)[0])  # aot sorts a batch
    one, other = (of_one(p, reference) for p in (policy, policy.flip(-1)))
    best = h[(probability * one + (1 - probability) * other).argmin()].item()
    assert best == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("name", OPTIMA_OF_BOTH)
def test_both_log_ratios_at_the_optimum(name):
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    reference = torch.full((2,), -math.log(3), dtype=torch.float64)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss_of():
        optimizer.zero_grad()
        pair = torch.log_softmax(theta, dim=-1)[:2]
        policy = torch.stack([pair, pair.flip(0)])
        losses = PAIR_LOSSES[name](Pairs(policy, reference.expand(2, 2), baseline=-1.0), LOSSES[name](beta=B))
        loss = P * losses[0] + (1 - P) * losses[1]
        loss.backward()
        return loss

    optimizer.step(loss_of)
    found = torch.log_softmax(theta.detach(), dim=-1)[:2] - reference
    assert found.tolist() == pytest.approx(OPTIMA_OF_BOTH[name], abs=1e-5)


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
