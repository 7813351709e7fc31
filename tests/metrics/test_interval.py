from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.metrics.interval import clustered_interval, wilson_interval


def test_wilsons_formula_by_hand() -> None:
    # With z = 1.959964, n = 100, p = 0.2: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    z = 1.959963984540054
    centre, half = 0.2 + z**2 / 200, z * math.sqrt(0.2 * 0.8 / 100 + z**2 / 40000)
    assert wilson_interval(20, 100) == pytest.approx(
        ((centre - half) / (1 + z**2 / 100), (centre + half) / (1 + z**2 / 100)), abs=1e-12
    )


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


@given(outcomes=st.lists(st.booleans(), min_size=1, max_size=60))
def test_with_one_answer_a_question_it_is_wilsons(outcomes: list[bool]) -> None:
    assert clustered_interval([float(outcome) for outcome in outcomes]) == pytest.approx(
        wilson_interval(sum(outcomes), len(outcomes)), abs=1e-12
    )


@given(outcomes=st.lists(st.booleans(), min_size=2, max_size=40), k=st.integers(2, 16))
def test_answers_to_a_question_that_are_all_alike_count_once(outcomes: list[bool], k: int) -> None:
    means = [float(outcome) for outcome in outcomes]
    assert clustered_interval(means, samples_each=k) == pytest.approx(clustered_interval(means), abs=1e-12)


def test_answers_that_differ_as_if_of_different_questions_count_one_by_one() -> None:
    # 12 of 48 are right, 2 of 8 in every question, so questions do not differ.
    assert clustered_interval([0.25] * 6, samples_each=8) == pytest.approx(wilson_interval(12, 48), abs=1e-12)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    """Questions differ in difficulty (Beta) and have 8 answers each.

    The plain Wilson interval over all answers is too narrow, and this one is not.
    """
    rng = np.random.default_rng(0)
    hits = {"clustered": 0, "plain": 0}
    runs = 1000
    for _ in range(runs):
        right = rng.binomial(8, rng.beta(0.4, 0.6, size=30))  # mean 0.4
        low, high = clustered_interval((right / 8).tolist(), samples_each=8)
        hits["clustered"] += low <= 0.4 <= high
        low, high = wilson_interval(int(right.sum()), 240)
        hits["plain"] += low <= 0.4 <= high
    assert 0.93 <= hits["clustered"] / runs <= 0.98
    assert hits["plain"] / runs < 0.75


def test_of_one_question_all_answers_count_once() -> None:
    # Wilson's formula with n = 1 and p = 1/2: 1/2 +- z / (2 sqrt(1 + z^2)).
    half = 1.959963984540054 / (2 * math.sqrt(1 + 1.959963984540054**2))
    assert clustered_interval([0.5], samples_each=64) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-12)


def test_questions_of_unequally_many_answers_weigh_by_them() -> None:
    # 2 of 2 and 0 of 6: p = 1/4. The weighted deviations are 1/2 x 3/4 and 3/2 x -1/4, so
    # n = 2 p (1 - p) / (9/64) = 8/3.
    z, p, n = 1.959963984540054, 0.25, 8 / 3
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = ((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n))
    assert clustered_interval([1.0, 0.0], samples_each=[2, 6]) == pytest.approx(expected, abs=1e-12)
    means = [0.0, 0.25, 1.0, 0.5]
    assert clustered_interval(means, samples_each=[4] * 4) == clustered_interval(means, samples_each=4)
