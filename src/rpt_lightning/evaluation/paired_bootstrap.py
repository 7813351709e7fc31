"""Test whether one policy is better than another at the same positions, by a paired bootstrap over documents.

Positions in one document share its topic and its text, so they are not independent. The right unit to
resample is therefore the document (the cluster bootstrap; Davison and Hinkley, Bootstrap Methods, 1997,
section 3.8). Resampling positions gives an interval that is too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from statistics import fmean, stdev

import numpy as np
from scipy.stats import t as student_t

from rpt_lightning.records.results import PositionResult, Results, pair_results

# Resamples are drawn in blocks of at most this many counts (8 bytes each), which bounds the memory.
_MAX_COUNTS = 4_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The accuracy difference ``second - first``, as fractions, with its percentile interval."""

    first: float
    second: float
    low: float
    high: float
    level: float
    num_positions: int
    num_units: int

    @property
    def difference(self) -> float:
        return self.second - self.first

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0


def compare_policies(
    first: Results, second: Results, *, num_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Difference:
    """Compare the reasoning accuracy of ``second`` with that of ``first`` at the same positions.

    Raises:
        ValueError: The two were measured at different positions, there are no positions, or one policy was
            not asked to reason.
    """
    pairs = pair_results(first, second)
    return paired_bootstrap(
        _reasoning(first, [one for one, _ in pairs]),
        _reasoning(second, [other for _, other in pairs]),
        units=[one.doc_id for one, _ in pairs],
        num_resamples=num_resamples,
        level=level,
        seed=seed,
    )


def _reasoning(results: Results, positions: Sequence[PositionResult]) -> list[bool]:
    outcomes = [
        position.reasoning_correct for position in positions if position.reasoning_correct is not None
    ]
    if len(outcomes) != len(positions):
        raise ValueError(
            f"Results of {results.policy_path}: no reasoning accuracy. Validate with a config that has a "
            "rollout engine."
        )
    return outcomes


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    *,
    units: Sequence[str],
    num_resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Estimate the mean of ``second - first`` [N] and its percentile interval.

    The values are outcomes, or shares of samples. Whole ``units`` [N] are resampled with replacement.

    Raises:
        ValueError: There are no positions.
    """
    if not len(first) == len(second) == len(units):
        raise ValueError(
            f"Paired results need equal lengths; got {len(first)}, {len(second)} and {len(units)} units."
        )
    if not len(first):
        raise ValueError("No positions to compare.")
    gains = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)  # [N]
    _, unit_of_position = np.unique(np.asarray(units), return_inverse=True)  # [N]
    gain_sums = np.bincount(unit_of_position, weights=gains)  # [U]
    sizes = np.bincount(unit_of_position)  # [U]
    means = _resampled_means(gain_sums, sizes, num_resamples, seed)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(
        first=float(np.mean(first)),
        second=float(np.mean(second)),
        low=float(low),
        high=float(high),
        level=level,
        num_positions=len(gains),
        num_units=len(sizes),
    )


def interval_over_runs(gains: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Compute Student's interval for the mean gain over runs.

    It says how far other runs of the same experiment would move the mean at the same positions.

    >>> low, high = interval_over_runs([0.045, 0.017, 0.005])
    >>> round(low, 3), round(high, 3)
    (-0.029, 0.073)

    Raises:
        ValueError: There are fewer than two runs, which says nothing about other runs.
    """
    if len(gains) < 2:
        raise ValueError(f"{len(gains)} run: an interval over runs needs at least two.")
    half = float(student_t.ppf((1 + level) / 2, len(gains) - 1)) * stdev(gains) / sqrt(len(gains))
    return fmean(gains) - half, fmean(gains) + half


def _resampled_means(gain_sums: np.ndarray, sizes: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Return the resampled means, [num_resamples].

    The number of times that each of U units is drawn in U draws is multinomial, so a resample is one
    product with the sums.
    """
    num_units = len(sizes)
    if num_resamples * num_units <= _MAX_COUNTS:
        counts = _counts(num_units, num_resamples, seed)
        return (counts @ gain_sums) / (counts @ sizes)
    rng = np.random.default_rng(seed)
    block = max(1, _MAX_COUNTS // num_units)
    means = []
    for start in range(0, num_resamples, block):
        counts = _draw(num_units, min(block, num_resamples - start), rng)
        means.append((counts @ gain_sums) / (counts @ sizes))
    return np.concatenate(means)


@lru_cache(maxsize=2)
def _counts(num_units: int, num_resamples: int, seed: int) -> np.ndarray:
    """Draw counts [R, U] and keep them.

    Drawing takes most of the time, and a table makes many comparisons over the same number of documents.
    """
    return _draw(num_units, num_resamples, np.random.default_rng(seed))


def _draw(num_units: int, num_resamples: int, rng: np.random.Generator) -> np.ndarray:
    return rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=num_resamples)  # [R, U]
