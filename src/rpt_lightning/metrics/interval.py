"""Confidence intervals of a share."""

from __future__ import annotations

from scipy.stats import binomtest


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of ``successes / n`` (Wilson 1927): sensible near 0 and 1, where next-token reasoning starts. (0, 1) where ``n`` is 0.

    >>> low, high = wilson_interval(3, 96)
    >>> round(low, 4), round(high, 4)
    (0.0107, 0.0879)
    """
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
    return float(interval.low), float(interval.high)
