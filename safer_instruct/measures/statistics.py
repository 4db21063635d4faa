"""Intervals, paired tests and regressions of the report; SciPy and statsmodels do the computing.

Shares and differences are fractions, not per cent; intervals are two-sided 95%. The two libraries take seconds to
import and are needed by a report alone, so they are imported where they are called.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000  # of a bootstrap: its quantiles then move by less than 0.05 standard errors


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the 95% score interval of a binomial share (Wilson 1927): inside [0, 1], and honest at 0 and n.

    Raises:
        ValueError: If not 0 <= successes <= n, or n is 0.
    """
    from statsmodels.stats.proportion import proportion_confint

    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"an interval needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    low, high = proportion_confint(successes, n, alpha=0.05, method="wilson")
    # At the ends the bound is exactly 0 or 1; rounding would leave it at 1e-17.
    return (0.0 if successes == 0 else float(low)), (1.0 if successes == n else float(high))


def weighted_interval(shares: Sequence[tuple[int, int, float]]) -> tuple[float, float, float]:
    """Return a share over strata that were not drawn in proportion to their size, and its 95% interval.

    The interval is Wilson's at the effective number of draws, 1 / sum(w^2 / n) for the strata's parts w of the whole
    (Kish 1965): without strata it is Wilson's own, and it has a width where all draws are alike.

    Args:
        shares: (successes, n, size) of each stratum, n > 0.
    """
    from statsmodels.stats.proportion import proportion_confint

    total = sum(size for _, _, size in shares)
    value = sum(size / total * k / n for k, n, size in shares)
    effective = 1 / sum((size / total) ** 2 / n for _, n, size in shares)
    low, high = proportion_confint(value * effective, effective, alpha=0.05, method="wilson")
    return value, min(value, max(0.0, float(low))), max(value, min(1.0, float(high)))


def harmonic_mean(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float, float]:
    """Return the harmonic mean of two shares and its 95% interval.

    The interval is that of the mean of two shares drawn from their Jeffreys posteriors, Beta(k + 1/2, n - k + 1/2),
    which knows no corner: at 0 and 1 a normal approximation has no width.

    Each share is (successes, n), n > 0.
    """

    def mean(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return 2 * p * q / np.maximum(p + q, np.finfo(float).tiny)

    shares = [np.array(k / n) for k, n in (first, second)]
    random = np.random.default_rng(0)
    drawn = [random.beta(k + 0.5, n - k + 0.5, RESAMPLES) for k, n in (first, second)]
    value = float(mean(*shares))
    low, high = np.quantile(mean(*drawn), (0.025, 0.975)).tolist()
    return value, min(low, value), max(high, value)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How two models differ on the same prompts: share of the second minus share of the first."""

    n: int  # prompts that count for both models
    only_first: int  # prompts that are counted for the first model alone (McNemar's b)
    only_second: int  # prompts that are counted for the second model alone (McNemar's c)
    difference: float  # (only_second - only_first) / n
    # Lower end of the bootstrap interval; None where no prompt differs, or all do in the same way: resampling then
    # knows nothing.
    low: float | None
    high: float | None  # its upper end
    p: float  # exact McNemar test of "no difference", two-sided


def compare_paired(both: Sequence[tuple[bool, bool]], *, seed: int = 0) -> PairedDifference | None:
    """Compute the exact McNemar test and the bootstrap interval of the difference of two shares over the same prompts.

    `both` says of each prompt whether it counts for the first model, and for the second; without one there is None.
    """
    if not both:
        return None
    first, second = np.array(both, dtype=bool).T
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    n = len(both)
    low, high = _bootstrap_difference(n, only_first, only_second, seed)
    p = mcnemar_p(only_first, only_second)
    return PairedDifference(n, only_first, only_second, (only_second - only_first) / n, low, high, p)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Test exactly, two-sided: of the prompts that differ, is either model's share a half (McNemar 1947)?"""
    from statsmodels.stats.contingency_tables import mcnemar

    return float(mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue)


def _bootstrap_difference(n: int, only_first: int, only_second: int, seed: int) -> tuple[float | None, float | None]:
    """Return the percentile interval of the mean of n values in {-1, 0, 1}, resampled with replacement.

    How often each value comes up in a resample is a multinomial draw, so that 100,000 prompts cost as much as ten.
    """
    if only_first + only_second == 0 or n in (only_first, only_second):
        return None, None
    shares = [only_first / n, only_second / n, (n - only_first - only_second) / n]
    draws = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES)
    low, high = np.quantile((draws[:, 1] - draws[:, 0]) / n, [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number, in their order (Holm 1979): the chance of any false finding stays 5%."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def cohens_kappa(counts: Sequence[Sequence[int]]) -> tuple[float, float, float] | None:
    """Measure agreement beyond chance, with its 95% interval (Cohen 1960; Fleiss, Cohen and Everitt 1969).

    Returns (kappa, low, high) of a square table, in whose rows are the first judge's classes, in its columns the
    second's; None where it is undefined: no row, or both judges say the same one thing throughout.
    """
    from statsmodels.stats.inter_rater import cohens_kappa as kappa_of

    table = np.array(counts)
    used = table[:, table.any(0) | table.any(1)][table.any(0) | table.any(1)]
    if len(used) < 2:
        return None
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # a variance of 0 over 0 is answered with nan, below
        found = kappa_of(used)
    values = float(found.kappa), float(found.kappa_low), float(found.kappa_upp)
    return values if all(map(math.isfinite, values)) else None


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often a model's answers are preferred to the baseline's, ties counted as half."""

    n: int  # prompts
    value: float  # the plain win rate
    low: float  # lower end of its interval (bootstrap)
    high: float  # its upper end
    controlled: float | None  # the win rate at equal length of the two answers; None where the regression has no answer
    controlled_low: float | None  # lower end of its interval
    controlled_high: float | None  # its upper end
    length_effect: float | None  # log-odds of winning by a standard deviation more of length; None as `controlled`


def win_rate(scores: Sequence[float], extra_length: Sequence[float], *, seed: int = 0) -> WinRate:
    """Compute plain and length-controlled win rates (Dubois et al. 2024, AlpacaEval 2, without its instruction terms).

    The model is P(win) = sigmoid(a + b tanh(d / sd(d))), d being the model's length minus the baseline's; ties and
    answers preferred in one position only count as half a win. At d = 0 this is sigmoid(a).

    Args:
        scores: 1 the model wins, 0 the baseline does, 0.5 neither; one a prompt.
        extra_length: Length of the model's answer minus that of the baseline's.
        seed: Of the bootstrap.

    Raises:
        ValueError: No score, or not as many of one as of the other.
    """
    if not scores or len(scores) != len(extra_length):
        raise ValueError(f"{len(scores)} scores and {len(extra_length)} lengths: one of each for every prompt")
    wins, extra = np.array(scores, dtype=float), np.array(extra_length, dtype=float)
    values, counts = np.unique(wins, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(wins), counts / len(wins), size=RESAMPLES) @ values
    low, high = np.quantile(draws / len(wins), [0.025, 0.975])
    plain = (len(wins), float(wins.mean()), float(low), float(high))
    return WinRate(*plain, *(_length_controlled(wins, extra) or (None, None, None, None)))


def _length_controlled(wins: np.ndarray, extra: np.ndarray) -> tuple[float, float, float, float] | None:
    """Return (win rate at equal length, low, high, length effect); None without variation, or if lengths decide all."""
    import statsmodels.api as sm
    from scipy.special import expit
    from statsmodels.tools.sm_exceptions import ConvergenceWarning, PerfectSeparationWarning

    spread = extra.std()
    if spread == 0 or wins.std() == 0:
        return None
    design = sm.add_constant(np.tanh(extra / spread), has_constant="add")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PerfectSeparationWarning)
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            # Halves are no Bernoulli draws: the sandwich gives them the variance that they have.
            fit = sm.GLM(wins, design, family=sm.families.Binomial()).fit(cov_type="HC0")
        except (PerfectSeparationWarning, ConvergenceWarning, np.linalg.LinAlgError):
            return None
    (low, high), _ = fit.conf_int()
    values = [float(value) for value in (expit(fit.params[0]), expit(low), expit(high), fit.params[1])]
    return (values[0], values[1], values[2], values[3]) if all(map(math.isfinite, values)) else None


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high) with Student's t; a single value has no interval, and is all three.

    Raises:
        ValueError: No value.
    """
    from scipy.stats import ttest_1samp

    if not values:
        raise ValueError("a mean needs at least one value")
    mean = float(np.mean(values))
    if len(values) < 2 or float(np.std(values)) == 0:
        return mean, mean, mean
    interval = ttest_1samp(values, 0.0).confidence_interval(0.95)
    return mean, float(interval.low), float(interval.high)
