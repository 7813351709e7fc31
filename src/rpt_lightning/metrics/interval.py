"""Confidence intervals of shares."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist, fmean

from scipy.stats import binomtest

_Z95 = NormalDist().inv_cdf(0.975)


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's score interval of ``successes / n`` (Wilson 1927).

    It is sensible near 0 and 1, where next-token reasoning starts. It is (0, 1) if ``n`` is 0.

    >>> low, high = wilson_interval(3, 96)
    >>> round(low, 4), round(high, 4)
    (0.0107, 0.0879)
    """
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)


def clustered_interval(
    means: Sequence[float], *, samples_each: int | Sequence[int] = 1
) -> tuple[float, float]:
    """Compute the 95 % interval of the mean over all answers, with the answers to a question as a cluster.

    ``means`` [N] are the shares of right answers to each question, out of ``samples_each`` (one number, or
    [N]). The interval is Wilson's with the effective sample size p (1 - p) / Var(p), so answers to one
    question do not count as independent (Korn and Graubard 1998, Survey Methodology 24). Var(p) is the
    variance of a mean of N questions, weighted by their answers. With equally many answers each, it is
    Var(means) / N.

    The effective size lies between N (all answers to a question alike) and the number of answers (as if each
    answered a different question). It is N if every answer is right or every answer is wrong. It is also N
    for a single question, which says nothing about other questions. With one answer for each question this
    is Wilson's interval. Without questions it is (0, 1).

    >>> low, high = clustered_interval([0.0] * 30, samples_each=8)
    >>> low, round(high, 3)
    (0.0, 0.114)
    """
    num = len(means)
    if num == 0:
        return 0.0, 1.0
    sizes = [samples_each] * num if isinstance(samples_each, int) else samples_each
    total = sum(sizes)
    p = sum(size * mean for size, mean in zip(sizes, means, strict=True)) / total
    spread = fmean((size * num / total * (mean - p)) ** 2 for size, mean in zip(sizes, means, strict=True))
    effective = float(num)
    if 0 < p < 1 and num > 1:
        effective = total if spread == 0 else min(total, max(num, num * p * (1 - p) / spread))
    z2 = _Z95**2
    centre = (p + z2 / (2 * effective)) / (1 + z2 / effective)
    half = _Z95 / (1 + z2 / effective) * sqrt(p * (1 - p) / effective + z2 / (4 * effective**2))
    return max(0.0, centre - half), min(1.0, centre + half)
