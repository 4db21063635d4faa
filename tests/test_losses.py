"""Losses against a literal reading of the papers, one pair at a time in Python's float64, and finite differences.

The formulas below are typed from the papers, with `log(1 / (1 + exp(-x)))` spelled out: no code is shared with what
they check. a, b = log pi/ref of chosen and rejected, h = a - b, w, v = log pi of chosen
and rejected under the policy alone.
"""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config.settings import LOSSES, PairLossSettings
from trainers.losses import ANSWER_LOSSES, PAIR_LOSSES
from trainers.losses.responses import Answers, Pairs, pair_weights, reward_accuracy

B, E = 0.3, 0.2  # beta, label smoothing
PAIRED = [name for name, kind in LOSSES.items() if issubclass(kind, PairLossSettings)]


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def ls(x: float) -> float:
    return min(x, 0) - math.log1p(math.exp(-abs(x)))


def log_odds(p: float) -> float:
    return math.log(math.exp(p) / (1 - math.exp(p)))


# Name -> keys, and the loss of a pair from a, b, p_w, p_l. Where a loss is on means per token, so are these.
CLOSED_FORMS = {
    # Rafailov et al. 2023, eq. 7; Mitchell 2023, eq. 3
    "dpo": ({}, lambda a, b, w, v: -ls(B * (a - b))),
    "cdpo": ({"label_smoothing": E}, lambda a, b, w, v: -(1 - E) * ls(B * (a - b)) - E * ls(-B * (a - b))),
    "rpo": ({}, lambda a, b, w, v: -ls(B * (a - b))),  # its likelihood term is the objective's
    # Chowdhury et al. 2024: l_e = ((1 - e) l(h) - e l(-h)) / (1 - 2 e), l(h) = -ls(b h)
    "robust": (
        {"label_smoothing": E},
        lambda a, b, w, v: ((1 - E) * -ls(B * (a - b)) - E * -ls(B * (b - a))) / (1 - 2 * E),
    ),
    "ipo": ({}, lambda a, b, w, v: (a - b - 1 / (2 * B)) ** 2),  # Azar et al. 2023, eq. 17
    "hinge": ({}, lambda a, b, w, v: max(0.0, 1 - B * (a - b))),  # Liu et al. 2023
    # Ji et al. 2024, eq. 16 for K = 2: KL between (s(bh), s(-bh)) and (1 - e, e)
    "exo_pair": (
        {"label_smoothing": E},
        lambda a, b, w, v: (
            s(B * (a - b)) * (ls(B * (a - b)) - math.log(1 - E)) + s(B * (b - a)) * (ls(B * (b - a)) - math.log(E))
        ),
    ),
    # Lu et al. 2024, eq. 5, tau = 0.05
    "discopop": (
        {},
        lambda a, b, w, v: (
            (1 - s(B * (a - b) / 0.05)) * -ls(B * (a - b)) + s(B * (a - b) / 0.05) * math.exp(-B * (a - b))
        ),
    ),
    # Chen et al. 2024: - ls(r_w) - 1/2 (ls(-r_w) + ls(-r_l))
    "nca_pair": ({}, lambda a, b, w, v: -ls(B * a) - 0.5 * (ls(-B * a) + ls(-B * b))),
    # Wu et al. 2024, eq. 4.7: (log pi/ref - eta (P - 1/2))^2, eta = 1 / b, P = 1 and 0
    "sppo_hard": ({}, lambda a, b, w, v: (a - (1 - 0.5) / B) ** 2 + (b - (0 - 0.5) / B) ** 2),
    "apo_zero": ({}, lambda a, b, w, v: 1 - s(B * a) + s(B * b)),  # D'Oosterlinck et al. 2024, eq. 7
    "apo_down": ({}, lambda a, b, w, v: s(B * a) + 1 - s(B * (a - b))),  # eq. 8
    "dpop": ({"penalty": 3.0}, lambda a, b, w, v: -ls(B * (a - b - 3.0 * max(0.0, -a)))),  # Pal et al. 2024, eq. 3
    "dpo_norm": ({}, lambda a, b, w, v: -ls(B * (a - b))),  # Lambert et al. 2024; means per token
    "bco_pair": ({}, lambda a, b, w, v: -ls(B * a - 0.7) - ls(-(B * b - 0.7))),  # Jung et al. 2024; delta = 0.7
    "aot": ({"label_smoothing": E}, lambda a, b, w, v: -(1 - E) * ls(B * (a - b)) - E * ls(B * (b - a))),  # one pair
    # Zhao et al. 2023, eq. 1, with delta = b
    "slic": ({"likelihood_weight": 0.4}, lambda a, b, w, v: max(0.0, B - w + v) - 0.4 * w),
    "cpo": ({}, lambda a, b, w, v: -ls(B * w - B * v)),  # Xu et al. 2024, eq. 3
    "orpo": ({}, lambda a, b, w, v: B * -ls(log_odds(w) - log_odds(v))),  # Hong et al. 2024, eq. 7 times lambda
    "simpo": ({"gamma": 0.6}, lambda a, b, w, v: -ls(B * w - B * v - 0.6)),  # Meng et al. 2024, eq. 6
    # Gupta et al. 2025: r = b (1 - pi^-alpha) / alpha, of the geometric mean of the token probabilities
    "alphapo": (
        {"gamma": 0.6, "alpha": 0.25},
        lambda a, b, w, v: -ls(B * (1 - math.exp(w) ** -0.25) / 0.25 - B * (1 - math.exp(v) ** -0.25) / 0.25 - 0.6),
    ),
}
LOGP = st.floats(-40, -0.01, allow_nan=False)


def settings_of(name: str, **keys):
    own = {"beta": B, **CLOSED_FORMS[name][0], **keys}
    return LOSSES[name](**own)


def one_pair(policy, reference, *, baseline=0.7) -> Pairs:
    return Pairs(*(torch.tensor([row], dtype=torch.float64) for row in (policy, reference)), baseline=baseline)


def vectors(num_pairs: int, seed: int, scale: float = 5.0) -> list[torch.Tensor]:
    """Log-probabilities (B, 2) of policy and reference, away from 0, where odds are infinite."""
    generator = torch.Generator().manual_seed(seed)
    return [-0.1 - scale * torch.rand(num_pairs, 2, dtype=torch.float64, generator=generator) for _ in range(2)]


def test_every_loss_on_pairs_is_here():
    assert list(CLOSED_FORMS) == list(PAIR_LOSSES) == PAIRED
    assert {name for name, kind in LOSSES.items() if kind.rows == "answers"} == set(ANSWER_LOSSES)


@pytest.mark.parametrize("name", CLOSED_FORMS)
@settings(max_examples=60)
@given(LOGP, LOGP, LOGP, LOGP)
def test_values_are_the_papers(name, w, v, ref_w, ref_v):
    loss = PAIR_LOSSES[name](one_pair((w, v), (ref_w, ref_v)), settings_of(name))
    assert loss.shape == (1,)
    expected = CLOSED_FORMS[name][1](w - ref_w, v - ref_v, w, v)
    assert loss.item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_gradients_equal_finite_differences(name):
    policy, reference = vectors(6, seed=1)

    def loss(policy):
        return PAIR_LOSSES[name](Pairs(policy, reference, baseline=0.7), settings_of(name))

    assert torch.autograd.gradcheck(loss, policy.requires_grad_(), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("h", [-50.0, 50.0])
@pytest.mark.parametrize("beta", [B, 1.0])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_losses_and_gradients_stay_finite_far_out(name, beta, h, dtype):
    """h = +-50 nats, from either response."""
    chosen = torch.tensor([[-50.0, -100.0], [-1.0, -51.0]] if h > 0 else [[-100.0, -50.0], [-51.0, -1.0]], dtype=dtype)
    policy = chosen.requires_grad_()
    reference = torch.full_like(policy, -50.0)
    losses = PAIR_LOSSES[name](Pairs(policy, reference), settings_of(name, beta=beta))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["dpo", "cdpo", "ipo"])
def test_values_are_the_dpo_repos(name):
    """Typed from `preference_loss` of eric-mitchell/direct-preference-optimization, trainers.py, at its defaults' beta.

    `ipo` is its key for the second branch, `label_smoothing` its key for cDPO.
    """
    policy, reference = vectors(64, seed=7, scale=60.0)
    beta, label_smoothing, ipo = 0.1, 0.1 if name == "cdpo" else 0.0, name == "ipo"
    logits = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
    if ipo:
        expected = (logits - 1 / (2 * beta)) ** 2
    else:
        smooth = torch.nn.functional.logsigmoid(-beta * logits) * label_smoothing
        expected = -torch.nn.functional.logsigmoid(beta * logits) * (1 - label_smoothing) - smooth
    losses = PAIR_LOSSES[name](Pairs(policy, reference), LOSSES[name]())
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", ["dpo", "robust", "ipo", "hinge", "exo_pair", "discopop"])
def test_f_divergences_are_those_of_the_table(name, divergence):
    """Wang et al. 2023, table 1: f'(u) = -1/u, log(2u / (1 + u)), (1 - u^-alpha) / alpha; the loss reads b f'."""
    slopes = {
        "forward_kl": lambda u: -1 / u,
        "js": lambda u: math.log(2 * u / (1 + u)),
        "alpha": lambda u: (1 - u**-0.4) / 0.4,
    }
    policy, reference = vectors(8, seed=2)
    losses = PAIR_LOSSES[name](Pairs(policy, reference), settings_of(name, f_divergence=divergence, f_alpha=0.4))
    for i in range(8):
        a, b = (slopes[divergence](math.exp(x)) for x in (policy[i] - reference[i]).tolist())
        assert losses[i].item() == pytest.approx(CLOSED_FORMS[name][1](a, b, None, None), rel=1e-9)


def test_f_alpha_goes_over_into_its_neighbours():
    """alpha -> 0 is reverse KL, alpha -> 1 forward KL (up to a constant that h does not see)."""
    pairs = Pairs(*vectors(8, seed=3))
    for alpha, neighbour in ((1e-7, "reverse_kl"), (1 - 1e-7, "forward_kl")):
        near = PAIR_LOSSES["dpo"](pairs, settings_of("dpo", f_divergence="alpha", f_alpha=alpha))
        torch.testing.assert_close(
            near, PAIR_LOSSES["dpo"](pairs, settings_of("dpo", f_divergence=neighbour)), rtol=1e-4, atol=1e-5
        )


def test_wpo_weighs_by_the_geometric_means_of_both_responses():
    """Zhou et al. 2024, eq. 2: w(x, y_w) w(x, y_l), w = exp(1/|y| sum of log pi)."""
    policy, lengths = torch.tensor([[-6.0, -8.0]], dtype=torch.float64).requires_grad_(), torch.tensor([[3, 4]])
    weight = pair_weights(policy, lengths)
    assert weight.item() == pytest.approx(math.exp(-6 / 3) * math.exp(-8 / 4))
    assert not weight.requires_grad


@pytest.mark.parametrize("form", ["paired", "unpaired"])
def test_aot_compares_order_statistics(form):
    """Melnyk et al. 2024: the k-th smallest of one side with the k-th smallest of the other, found here by ranks."""
    policy, reference = vectors(7, seed=4)
    losses = PAIR_LOSSES["aot"](Pairs(policy, reference), settings_of("aot", form=form, label_smoothing=0.0))
    p, r = policy.tolist(), reference.tolist()
    if form == "paired":
        high, low = [w - v for w, v in p], [w - v for w, v in r]
    else:
        high, low = ([p[i][side] - r[i][side] for i in range(7)] for side in (0, 1))
    expected = [-ls(B * (x - y)) for x, y in zip(sorted(high), sorted(low), strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-10)
    shuffled = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    again = PAIR_LOSSES["aot"](
        Pairs(policy[shuffled], reference[shuffled]), settings_of("aot", form=form, label_smoothing=0.0)
    )
    assert again.sum().item() == pytest.approx(losses.sum().item(), rel=1e-12)


def test_the_margin_of_simpo_has_two_spellings():
    pairs = Pairs(*vectors(3, seed=5))
    absolute, relative = LOSSES["simpo"](beta=2.0, gamma=1.5), LOSSES["simpo"](beta=2.0, gamma_beta_ratio=0.75)
    assert torch.equal(PAIR_LOSSES["simpo"](pairs, absolute), PAIR_LOSSES["simpo"](pairs, relative))


@settings(max_examples=100)
@given(LOGP, LOGP, st.booleans(), st.floats(0, 5))
def test_answer_losses_are_the_papers(policy, reference, is_good, z0):
    """Ethayarajh et al. 2024, eq. 8: lambda_y - v; D'Oosterlinck et al. 2024, eq. 7, answer by answer."""
    r, weight = policy - reference, 1.3 if is_good else 0.6
    answers = Answers(
        torch.tensor([r], dtype=torch.float64), torch.tensor([is_good]), torch.tensor(z0, dtype=torch.float64)
    )
    keys = {"beta": B, "good_weight": 1.3, "bad_weight": 0.6}
    value = weight * (s(B * (r - z0)) if is_good else s(B * (z0 - r)))
    kto = ANSWER_LOSSES["kto"](answers, LOSSES["kto"](**keys))
    assert kto.item() == pytest.approx(weight - value, rel=1e-10, abs=1e-12)
    apo = ANSWER_LOSSES["apo_zero_unpaired"](answers, LOSSES["apo_zero_unpaired"](**keys))
    assert apo.item() == pytest.approx(weight * ((1 - s(B * r)) if is_good else s(B * r)), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("name", ANSWER_LOSSES)
def test_gradients_of_answer_losses_equal_finite_differences(name):
    ratios = torch.linspace(-50, 50, 9, dtype=torch.float64).requires_grad_()
    is_good = torch.arange(9) % 2 == 0

    def loss(ratios):
        return ANSWER_LOSSES[name](Answers(ratios, is_good, torch.tensor(0.4)), LOSSES[name]())

    assert torch.autograd.gradcheck(loss, ratios, atol=1e-7)
    assert loss(ratios).isfinite().all()


def test_dpo_gradient_is_the_one_of_the_paper():
    """Rafailov et al., section 4: d loss / d log pi(y_w) = -beta sigmoid(r_l - r_w), and its negative for y_l."""
    policy, reference = vectors(6, seed=0, scale=50.0)
    policy.requires_grad_()
    PAIR_LOSSES["dpo"](Pairs(policy, reference), LOSSES["dpo"](beta=0.1)).sum().backward()
    rewards = 0.1 * (policy.detach() - reference)
    expected = torch.tensor([-0.1 * s(low - high) for high, low in rewards.tolist()], dtype=torch.float64)
    torch.testing.assert_close(policy.grad, torch.stack([expected, -expected], dim=-1), rtol=1e-6, atol=1e-12)


def test_float32_stays_near_float64():
    exact = Pairs(*vectors(64, seed=2, scale=300.0))
    single = Pairs(exact.policy.float(), exact.reference.float())
    for name in ("dpo", "ipo", "hinge", "nca_pair"):
        near = PAIR_LOSSES[name](single, settings_of(name)).double()
        torch.testing.assert_close(near, PAIR_LOSSES[name](exact, settings_of(name)), rtol=1e-4, atol=1e-4)


def test_a_tie_is_half_right():
    accuracy = reward_accuracy(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert accuracy.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("name", [*PAIR_LOSSES, *ANSWER_LOSSES])
def test_a_loss_reads_every_key_that_it_has(name):
    """Change a key and the loss, or what the objective makes of it, changes: no key is there for show."""
    objectives = {"name", "nll_weight", "reference_free", "average_logps", "wpo", "ld_alpha", "f_alpha"}  # not here
    other = {"f_divergence": "js", "form": "unpaired", "gamma_beta_ratio": 0.9}
    own = [field.name for field in fields(LOSSES[name]) if field.name not in objectives]
    policy, reference = vectors(5, seed=6)
    answers = Answers((policy - reference)[:, 0], torch.arange(5) % 2 == 0, torch.tensor(0.5))

    def value(keys):
        loss = LOSSES[name](**keys)
        if name in ANSWER_LOSSES:
            return ANSWER_LOSSES[name](answers, loss).sum().item()
        return PAIR_LOSSES[name](Pairs(policy, reference), loss).sum().item()

    for key in own:
        changed = {key: other.get(key, vars(LOSSES[name]())[key] if key in other else 0.37)}
        assert value(changed) != value({}), key
