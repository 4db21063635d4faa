"""Intervals, paired tests and regressions of the report, computed with SciPy and statsmodels.

Shares and differences are fractions, not per cent; intervals are two-sided 95%. The two libraries take seconds to
import and only a report needs them, so they are imported inside the functions.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000  # per bootstrap: enough for its quantiles to vary by less than 0.05 standard errors


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the 95% score interval of a binomial share (Wilson 1927): inside [0, 1], and of nonzero width at 0 and n.

    Raises:
        ValueError: Not 0 <= successes <= n, or n is 0.
    """
    from statsmodels.stats.proportion import proportion_confint

    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"an interval needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    low, high = proportion_confint(successes, n, alpha=0.05, method="wilson")
    # At the ends the bound is exactly 0 or 1, but rounding would make it 1e-17.
    return (0.0 if successes == 0 else float(low)), (1.0 if successes == n else float(high))


def weighted_interval(shares: Sequence[tuple[int, int, float]]) -> tuple[float, float, float]:
    """Return a share over strata that were not sampled in proportion to their size, and its 95% interval.

    The interval is Wilson's at the effective sample size, 1 / sum(w^2 / n), where w are the strata's shares of the
    whole (Kish 1965). With one stratum it is the Wilson interval, and it has nonzero width even if all draws are equal.

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

    The shares are drawn from their Jeffreys posteriors, Beta(k + 1/2, n - k + 1/2), and the interval is that of their
    harmonic mean. A normal approximation would have zero width at 0 and 1.

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
    only_second: int  # prompts that are counted only for the second model (McNemar's c)
    difference: float  # (only_second - only_first) / n
    # Lower end of the bootstrap interval; None if no prompt differs, or all differ alike, since every resample is then
    # the same.
    low: float | None
    high: float | None  # its upper end
    p: float  # exact McNemar test of "no difference", two-sided


def compare_paired(both: Sequence[tuple[bool, bool]], *, seed: int = 0) -> PairedDifference | None:
    """Compute the exact McNemar test and the bootstrap interval of the difference of two shares over the same prompts.

    `both` holds, for each prompt, whether it counts for the first model and for the second. None without a prompt.
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
    """Return the exact two-sided p value of McNemar's test (1947) that each model wins half the differing prompts."""
    from statsmodels.stats.contingency_tables import mcnemar

    return float(mcnemar([[0, only_first], [only_second, 0]], exact=True).pvalue)


def _bootstrap_difference(n: int, only_first: int, only_second: int, seed: int) -> tuple[float | None, float | None]:
    """Return the percentile interval of the mean of n values in {-1, 0, 1}, resampled with replacement.

    The counts of the three values in a resample are one multinomial draw, so 100,000 prompts cost as much as ten.
    """
    if only_first + only_second == 0 or n in (only_first, only_second):
        return None, None
    shares = [only_first / n, only_second / n, (n - only_first - only_second) / n]
    draws = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES)
    low, high = np.quantile((draws[:, 1] - draws[:, 0]) / n, [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for multiple tests, in order (Holm 1979): at 0.05, the chance of any false finding stays 5%."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def cohens_kappa(counts: Sequence[Sequence[int]]) -> tuple[float, float, float] | None:
    """Measure agreement beyond chance, with its 95% interval (Cohen 1960; Fleiss, Cohen and Everitt 1969).

    Returns (kappa, low, high) of a square table with the first judge's classes as rows and the second's as columns.
    None if it is undefined: the table is empty, or both judges always give the same single class.
    """
    from statsmodels.stats.inter_rater import cohens_kappa as kappa_of

    table = np.array(counts)
    used = table[:, table.any(0) | table.any(1)][table.any(0) | table.any(1)]
    if len(used) < 2:
        return None
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # a variance of 0/0 is nan, which is handled below
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
    controlled: float | None  # the win rate at equal length of the two answers; None if the regression cannot be fitted
    controlled_low: float | None  # lower end of its interval
    controlled_high: float | None  # its upper end
    length_effect: float | None  # b of the regression: the effect of length on the log-odds; None as `controlled`


def win_rate(scores: Sequence[float], extra_length: Sequence[float], *, seed: int = 0) -> WinRate:
    """Compute plain and length-controlled win rates (Dubois et al. 2024, AlpacaEval 2, without its instruction terms).

    The regression is P(win) = sigmoid(a + b tanh(d / sd(d))), where d is the model's length minus the baseline's. Ties,
    and answers preferred in only one position, count as half a win. At d = 0 this is sigmoid(a).

    Args:
        scores: One per prompt: 1 if the model wins, 0 if the baseline wins, 0.5 if neither does.
        extra_length: Length of the model's answer minus that of the baseline's, one per prompt.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: There is no score, or the numbers of scores and lengths differ.
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
    """Return (win rate at equal length, low, high, length effect); None without variation, or if length decides."""
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
            # Scores of 0.5 are not Bernoulli draws; the sandwich estimator (HC0) uses their actual variance.
            fit = sm.GLM(wins, design, family=sm.families.Binomial()).fit(cov_type="HC0")
        except (PerfectSeparationWarning, ConvergenceWarning, np.linalg.LinAlgError):
            return None
    (low, high), _ = fit.conf_int()
    values = [float(value) for value in (expit(fit.params[0]), expit(low), expit(high), fit.params[1])]
    return (values[0], values[1], values[2], values[3]) if all(map(math.isfinite, values)) else None


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return (mean, low, high) with Student's t; without variation, or for a single value, all three are the mean.

    Raises:
        ValueError: There is no value.
    """
    from scipy.stats import ttest_1samp

    if not values:
        raise ValueError("a mean needs at least one value")
    mean = float(np.mean(values))
    if len(values) < 2 or float(np.std(values)) == 0:
        return mean, mean, mean
    interval = ttest_1samp(values, 0.0).confidence_interval(0.95)
    return mean, float(interval.low), float(interval.high)
