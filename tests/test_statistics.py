"""Statistics against their definitions, exact enumeration, SciPy, and simulations whose truth is known."""

import gc
import math
from math import comb

import numpy as np
import pytest
import scipy.stats
from scipy.special import expit

from safer_instruct.measures.statistics import (
    cohens_kappa,
    compare_paired,
    holm,
    mcnemar_p,
    mean_interval,
    wilson_interval,
    win_rate,
)


def pairs(both, only_first, only_second, neither):
    counts = {(True, True): both, (True, False): only_first, (False, True): only_second, (False, False): neither}
    return [pair for pair, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(("k", "n"), [(1, 2), (3, 10), (81, 263), (1, 200), (199, 200), (500, 100_000)])
def test_wilson_bounds_solve_the_equation_that_defines_them(k, n):
    z = 1.959963984540054
    low, high = wilson_interval(k, n)
    assert low < k / n < high
    for bound in (low, high):
        assert abs(k / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (81, 263), (1, 200)])
def test_wilson_equals_scipy(k, n):
    expected = scipy.stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_is_exact_at_the_ends():
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0


@pytest.mark.parametrize(("n", "p"), [(50, 0.3), (200, 0.05), (200, 0.5), (1000, 0.02)])
def test_wilson_covers_the_truth_as_often_as_it_says(n, p):
    """Exact, not simulated: the binomial probability of every count whose interval holds p."""
    covered = 0.0
    for k in range(n + 1):
        low, high = wilson_interval(k, n)
        covered += scipy.stats.binom.pmf(k, n, p) * (low <= p <= high)
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(("k", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson_interval(k, n)


@pytest.mark.parametrize(("b", "c"), [(0, 1), (3, 12), (12, 3), (5, 5), (0, 9), (7, 1)])
def test_mcnemar_is_the_two_sided_sign_test_of_the_pairs_that_differ(b, c):
    found = compare_paired(pairs(11, b, c, 20))
    tail = sum(comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
    assert found.p == pytest.approx(min(1.0, 2 * tail))
    assert (found.n, found.only_first, found.only_second) == (31 + b + c, b, c)
    assert found.difference == pytest.approx((c - b) / (31 + b + c))


def test_the_bootstrap_interval_is_scipys():
    both = pairs(30, 25, 9, 56)
    difference = np.array([second - first for first, second in np.array(both, dtype=int)])
    expected = scipy.stats.bootstrap(
        (difference,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    found = compare_paired(both)
    # quantiles of 10,000 draws: a standard error of 0.05 is 0.002 here, and a step of the mean is 1/120 = 0.008
    assert found.low == pytest.approx(expected.low, abs=0.0085)
    assert found.high == pytest.approx(expected.high, abs=0.0085)


def test_without_a_prompt_that_differs_there_is_no_interval():
    found = compare_paired(pairs(4, 0, 0, 6))
    assert (found.difference, found.low, found.high, found.p) == (0.0, None, None, 1.0)
    alike = compare_paired(pairs(0, 7, 0, 0))
    assert (alike.difference, alike.low, alike.high) == (-1.0, None, None)
    assert compare_paired([]) is None


def test_holm_steps_down():
    # sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2, 0.9 * 1, each at least its predecessor
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([]) == []


def test_kappa_equals_its_definition():
    # 35 of 50 agree; by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    kappa, low, high = cohens_kappa([[20, 5], [10, 15]])
    assert kappa == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert low < kappa < high
    assert cohens_kappa([[5, 0, 0], [0, 5, 0], [0, 0, 0]])[0] == pytest.approx(1.0)
    assert cohens_kappa([[5, 0], [0, 0]]) is None
    assert cohens_kappa([[0, 0], [0, 0]]) is None


def test_mean_interval_is_students():
    values = [0.3, -1.2, 2.2, 0.9]
    mean, low, high = mean_interval(values)
    half = scipy.stats.t.ppf(0.975, 3) * np.std(values, ddof=1) / 2
    assert (mean, low, high) == pytest.approx((0.55, 0.55 - half, 0.55 + half))
    assert mean_interval([2.0]) == (2.0, 2.0, 2.0)


def test_paired_intervals_cover_a_planted_difference_in_1000_simulations():
    """Two models on the same 300 prompts; harmful together in 20%, the first alone in 12%, the second alone in 5%."""
    random = np.random.default_rng(1)
    covered = {"difference": 0, "share": 0}
    for seed in range(1000):
        counts = random.multinomial(300, [0.20, 0.12, 0.05, 0.63])
        found = compare_paired(pairs(*counts), seed=seed)
        covered["difference"] += found.low <= 0.05 - 0.12 <= found.high
        low, high = wilson_interval(int(counts[0] + counts[1]), 300)
        covered["share"] += low <= 0.32 <= high
    for number in covered.values():
        assert 930 <= number <= 970, covered


def test_false_findings_stay_below_5_per_cent_after_holm_in_1000_simulations(monkeypatch):
    """Tables of 10 comparisons of models that do not differ: how many tables hold any false finding?"""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # statsmodels calls it each time: a minute of this test
    random = np.random.default_rng(2)
    uncorrected = corrected = 0
    for _ in range(1000):
        only_first = random.multinomial(300, [0.1, 0.1, 0.8], size=10)
        p_values = [mcnemar_p(int(b), int(c)) for b, c, _ in only_first]
        uncorrected += min(p_values) < 0.05
        corrected += min(holm(p_values)) < 0.05
    assert corrected <= 50
    assert uncorrected > 150  # without the correction the promise would be broken: the simulation can see it


def planted(random, n, *, quality, length_bias):
    """Wins of a model that is better by `quality` and longer by one deviation, before a judge that likes length."""
    extra = random.normal(60, 60, n)
    chance = expit(quality + length_bias * np.tanh(extra / extra.std()))
    return (random.random(n) < chance).astype(float), extra


@pytest.mark.parametrize(("quality", "length_bias"), [(0.0, 1.5), (-0.8, 1.0), (0.6, -0.7)])
def test_length_control_recovers_a_planted_bias(quality, length_bias):
    random = np.random.default_rng(3)
    found = win_rate(*map(list, planted(random, 40_000, quality=quality, length_bias=length_bias)))
    assert found.controlled == pytest.approx(expit(quality), abs=0.02)
    assert found.length_effect == pytest.approx(length_bias, abs=0.1)
    assert abs(found.value - expit(quality)) > 0.05  # the plain rate is off: there was a bias to remove


def test_length_controlled_intervals_cover_the_truth():
    random = np.random.default_rng(4)
    covered, estimates = 0, []
    for _ in range(300):
        wins, extra = planted(random, 400, quality=0.3, length_bias=1.0)
        found = win_rate(list(wins), list(extra))
        covered += found.controlled_low <= expit(0.3) <= found.controlled_high
        estimates.append(found.controlled)
    assert np.mean(estimates) == pytest.approx(expit(0.3), abs=0.02)
    assert 0.92 * 300 <= covered <= 0.98 * 300  # 300 simulations: two standard errors are 2.5 points


def test_win_rate_counts_a_tie_as_half():
    found = win_rate([1, 0, 0.5, 1], [3, -2, 1, 0])
    assert found.value == 0.625
    assert found.low < 0.625 < found.high


@pytest.mark.parametrize(
    ("scores", "extra"),
    [([1, 0, 1], [5, 5, 5]), ([1, 1, 1], [1, 2, 3]), ([0, 0, 1, 1], [-2, -1, 1, 2])],
    ids=["equal lengths", "one outcome", "length decides all"],
)
def test_length_control_says_when_it_has_no_answer(scores, extra):
    found = win_rate(scores, extra)
    assert found.controlled is None
    assert found.value == np.mean(scores)
