"""The scaling law of RPT: P(C) = A / C^alpha + P* (paper, section 4.3).

P is the accuracy of a checkpoint and C is its training compute. For a given alpha the law is linear in A
and P*, so the fit searches only for alpha. C is measured in units of the largest compute, which does not
change alpha and P*. The few checkpoints of a run hardly tell alpha and P* apart, so read the bootstrap
interval before the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

Floats = NDArray[np.float64]

# Beyond these bounds the curve is a straight line in log C, or a step at the first checkpoint.
ALPHA_BOUNDS = (1e-3, 10.0)
MIN_POINTS = 4  # one more than the law has parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingFit:
    """The fitted law: accuracy(C) = amplitude (C / C_max)^-alpha + limit.

    ``amplitude`` is A in units of accuracy at the largest compute. ``r_squared`` is NaN if all accuracies
    are equal, because there is nothing to explain.
    """

    amplitude: float
    alpha: float
    limit: float
    r_squared: float
    max_compute: float

    @property
    def doubt(self) -> str | None:
        """The reason why the checkpoints do not show where the curve bends; None if they do."""
        if math.isnan(self.r_squared):
            return "all accuracies are equal"
        if self.amplitude >= 0:
            return "accuracy falls"
        if _at_a_bound(self.alpha):
            return "alpha is at an end of the search range"
        return None if 0 <= self.limit <= 1 else f"P* would be {100 * self.limit:.0f} %"

    def predict(self, compute: Sequence[float] | Floats) -> Floats:
        """Return the accuracy at each compute (FLOPs)."""
        curve: Floats = (
            self.amplitude * (np.asarray(compute, dtype=np.float64) / self.max_compute) ** -self.alpha
            + self.limit
        )
        return curve


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingInterval:
    """Percentile intervals of a fit over resampled documents.

    They cover the parameters, and the curve itself at the compute of each checkpoint, [C].
    """

    amplitude: tuple[float, float]
    alpha: tuple[float, float]
    limit: tuple[float, float]
    curve_low: Floats
    curve_high: Floats
    level: float
    num_units: int

    @property
    def doubt(self) -> str | None:
        """The reason why other documents would show another law; None if they would not."""
        if any(_at_a_bound(end) for end in self.alpha):
            return (
                f"alpha's interval over documents, {self.alpha[0]:.3g} to {self.alpha[1]:.3g}, "
                "reaches an end of the search range"
            )
        if self.amplitude[1] >= 0:
            return "in some resamples of the documents, accuracy does not rise"
        if self.limit[0] < 0 or self.limit[1] > 1:
            return (
                f"P*'s interval over documents, {100 * self.limit[0]:.0f} to {100 * self.limit[1]:.0f} %, "
                "goes beyond 0 to 100 %"
            )
        return None


def _at_a_bound(alpha: float) -> bool:
    low, high = ALPHA_BOUNDS
    return not 1.01 * low < alpha < high / 1.01


def fit_scaling(compute: Sequence[float] | Floats, accuracy: Sequence[float] | Floats) -> ScalingFit:
    """Fit the law by least squares to accuracies [C] (fractions) at training compute [C] (FLOPs, above 0).

    Raises:
        ValueError: There are fewer than four checkpoints of different compute, or a compute is not above 0.
    """
    flops, values = np.asarray(compute, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    if len(flops) != len(values) or len(np.unique(flops)) < MIN_POINTS:
        raise ValueError(
            f"A scaling fit has three parameters and needs at least {MIN_POINTS} checkpoints of different "
            f"compute; got {len(np.unique(flops))}. Keep more with --checkpoint.keep_every_n_steps and "
            "validate each."
        )
    if flops.min() <= 0:
        raise ValueError(
            "A scaling fit needs training compute above 0: leave out the start of the run (step 0)."
        )
    relative = flops / flops.max()

    # The residual may have several minima, so the search begins at the best point of a grid.
    grid = np.linspace(math.log(ALPHA_BOUNDS[0]), math.log(ALPHA_BOUNDS[1]), 60)
    best = int(np.argmin(_line(relative, values, grid)[2]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    log_alpha = float(
        minimize_scalar(
            lambda point: _line(relative, values, point)[2].item(),
            bounds=bounds,
            method="bounded",
            options={"xatol": 1e-6},
        ).x
    )
    amplitude, limit, residual = (part.item() for part in _line(relative, values, log_alpha))
    total = float(((values - values.mean()) ** 2).sum())
    return ScalingFit(
        amplitude=amplitude,
        alpha=math.exp(log_alpha),
        limit=limit,
        r_squared=1 - residual / total if total else math.nan,
        max_compute=float(flops.max()),
    )


def _line(relative: Floats, values: Floats, log_alpha: float | Floats) -> tuple[Floats, Floats, Floats]:
    """Fit the least-squares line through (C^-alpha, accuracy) for each alpha [K].

    Returns A, P* and the squared residual.
    """
    return _least_squares(relative ** -np.exp(np.atleast_1d(log_alpha))[:, None], values)


def _residuals(basis: Floats, values: Floats) -> Floats:
    return _least_squares(basis, values)[2]


def _least_squares(basis: Floats, values: Floats) -> tuple[Floats, Floats, Floats]:
    """Fit the line through (basis, values) for each of K bases [K, C].

    Returns slope, offset and squared residual.
    """
    centred = basis - basis.mean(axis=1, keepdims=True)
    slope = (centred @ (values - values.mean())) / (centred**2).sum(axis=1)  # [K]
    offset = values.mean() - slope * basis.mean(axis=1)
    return slope, offset, ((slope[:, None] * basis + offset[:, None] - values) ** 2).sum(axis=1)


def compare_laws(compute: Sequence[float] | Floats, accuracy: Sequence[float] | Floats) -> dict[str, float]:
    """Compute Akaike's criterion of the paper's law and of two others through the same points [C].

    The criterion is corrected for the number of points, and the lowest value marks the best description.
    The laws, all fitted by least squares, are:

    - "power": A / C^alpha + P*
    - "exponential": A exp(-C / C0) + P*, which reaches its limit sooner
    - "logarithm": A log C + B, which has no limit

    A difference below 2 does not count (Burnham and Anderson 2002, section 2.6). The criterion is infinite
    if there are too few points for a law's parameters.
    """
    flops, values = np.asarray(compute, dtype=np.float64), np.asarray(accuracy, dtype=np.float64)
    relative = flops / flops.max()
    scales = np.geomspace(relative.min() / 10, 10, 2000)
    residuals = {
        "power": (float(((fit_scaling(flops, values).predict(flops) - values) ** 2).sum()), 3),
        "exponential": (float(_residuals(np.exp(-relative / scales[:, None]), values).min()), 3),
        "logarithm": (float(_residuals(np.log(relative)[None], values)[0]), 2),
    }
    return {name: _akaike(residual, len(values), num) for name, (residual, num) in residuals.items()}


def _akaike(residual: float, num_points: int, num_parameters: int) -> float:
    num_parameters += 1  # the size of the noise is a parameter as well
    if num_points <= num_parameters + 1:
        return math.inf
    log_likelihood = -num_points / 2 * math.log(max(residual, 1e-300) / num_points)
    return (
        -2 * log_likelihood
        + 2 * num_parameters
        + 2 * num_parameters * (num_parameters + 1) / (num_points - num_parameters - 1)
    )


def bootstrap_scaling(
    compute: Sequence[float],
    correct: NDArray[np.bool_],
    units: Sequence[str],
    *,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> ScalingInterval:
    """Measure how far the fit moves with other documents.

    Whole ``units`` [N] are resampled, the same ones at every checkpoint.

    Args:
        compute: FLOPs of training up to each checkpoint, [C].
        correct: Whether each checkpoint was right at each position, [C, N].
        units: The document of each position.
        num_resamples: Number of resamples, each with its own fit.
        level: Level of the intervals.
        seed: Seed of the resamples.
    """
    _, unit_of_position = np.unique(np.asarray(units), return_inverse=True)  # [N]
    sums = np.stack(
        [np.bincount(unit_of_position, weights=row) for row in correct.astype(np.float64)]
    )  # [C, U]
    sizes = np.bincount(unit_of_position)  # [U]
    counts = np.random.default_rng(seed).multinomial(
        len(sizes), np.full(len(sizes), 1 / len(sizes)), size=num_resamples
    )  # [R, U]
    fits = [fit_scaling(compute, (sums @ row) / (sizes @ row)) for row in counts]
    ends = [(1 - level) / 2, (1 + level) / 2]
    amplitude, alpha, limit = (
        np.quantile([getattr(fit, name) for fit in fits], ends) for name in ("amplitude", "alpha", "limit")
    )
    low, high = np.quantile([fit.predict(compute) for fit in fits], ends, axis=0)
    return ScalingInterval(
        amplitude=(float(amplitude[0]), float(amplitude[1])),
        alpha=(float(alpha[0]), float(alpha[1])),
        limit=(float(limit[0]), float(limit[1])),
        curve_low=low,
        curve_high=high,
        level=level,
        num_units=len(sizes),
    )
