"""Accuracy of several sampled answers at a position.

avg@n is the mean of all. pass@k is the chance that at least one of k is right.
"""

from __future__ import annotations

from math import comb


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimate pass@k without bias from n samples, of which c are right.

    The estimate is 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374, equation 1).

    >>> [round(pass_at_k(4, 1, k), 3) for k in (1, 2, 4)]
    [0.25, 0.5, 1.0]

    Raises:
        ValueError: k is not between 1 and n, or c is not between 0 and n.
    """
    if not 1 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(
            f"pass@{k} of {num_samples} samples, {num_correct} right: k must lie between 1 and the number "
            "of samples"
        )
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)
