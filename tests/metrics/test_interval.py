from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.metrics.interval import wilson_interval


def test_wilsons_formula_by_hand() -> None:
    # With z = 1.959964, n = 100, p = 0.2: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    z = 1.959963984540054
    centre, half = 0.2 + z**2 / 200, z * math.sqrt(0.2 * 0.8 / 100 + z**2 / 40000)
    assert wilson_interval(20, 100) == pytest.approx(((centre - half) / (1 + z**2 / 100), (centre + half) / (1 + z**2 / 100)), abs=1e-12)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_holds_the_share_and_narrows(successes_of: tuple[int, int]) -> None:
    successes, n = successes_of
    low, high = wilson_interval(successes, n)
    assert 0.0 <= low <= successes / n + 1e-12
    assert successes / n - 1e-12 <= high <= 1.0
    wide_low, wide_high = wilson_interval(successes, n, level=0.99)
    assert wide_low <= low < high <= wide_high


def test_nothing_is_known_from_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
