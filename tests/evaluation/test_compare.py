from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_lightning.evaluation.paired_bootstrap import compare_policies, paired_bootstrap
from sample_results import FIRST, SECOND, results


def positions_as_units(num: int) -> list[str]:
    return [str(index) for index in range(num)]


def test_ends_are_the_quantiles_of_the_exact_binomial():
    """If 6 of 20 pairs are won and none lost, a resample's gain is Binomial(20, 0.3) / 20.

    Its quantiles are known exactly.
    """
    second = [True] * 6 + [False] * 14
    difference = paired_bootstrap([False] * 20, second, units=positions_as_units(20), num_resamples=40_000)
    exact = scipy.stats.binom(20, 0.3).ppf([0.025, 0.975]) / 20
    assert (difference.low, difference.high) == pytest.approx(tuple(exact))
    assert difference.difference == pytest.approx(0.3)


def test_agrees_with_scipy():
    rng = np.random.default_rng(1)
    first = rng.random(200) < 0.3
    second = np.where(rng.random(200) < 0.7, first, rng.random(200) < 0.6)
    ours = paired_bootstrap(list(first), list(second), units=positions_as_units(200))
    gains = second.astype(float) - first
    theirs = scipy.stats.bootstrap(
        (gains,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_documents_of_equal_positions_count_once():
    """Ten documents of five identical positions hold the evidence of ten positions, not of fifty."""
    second = [index % 3 == 0 for index in range(10)]
    repeated = [outcome for outcome in second for _ in range(5)]
    documents = [str(index) for index in range(10) for _ in range(5)]
    by_document = paired_bootstrap([False] * 50, repeated, units=documents)
    of_ten = paired_bootstrap([False] * 10, second, units=positions_as_units(10))
    by_position = paired_bootstrap([False] * 50, repeated, units=positions_as_units(50))
    assert (by_document.low, by_document.high) == (of_ten.low, of_ten.high)
    assert by_document.high - by_document.low > 1.8 * (by_position.high - by_position.low)
    assert (by_document.num_units, by_document.num_positions) == (10, 50)


def test_documents_of_unequal_size_are_weighted_by_their_positions():
    """One document has 1 position (lost to won), the other has 3 (no change).

    A resample is (1, 1), (1, 3) or (3, 3), with means 1, 1/4 and 0.
    """
    difference = paired_bootstrap([False] * 4, [True, False, False, False], units=["a", "b", "b", "b"])
    assert (difference.low, difference.difference, difference.high) == (0.0, 0.25, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("abcde")), min_size=1, max_size=40))
def test_swapping_the_policies_mirrors_the_interval(rows: list[tuple[bool, bool, str]]):
    first, second, units = (list(column) for column in zip(*rows, strict=True))
    forward = paired_bootstrap(first, second, units=units, num_resamples=500, seed=3)
    backward = paired_bootstrap(second, first, units=units, num_resamples=500, seed=3)
    assert (forward.difference, forward.low, forward.high) == pytest.approx(
        (-backward.difference, -backward.high, -backward.low)
    )
    assert forward.low <= forward.high
    assert forward.low >= -1
    assert forward.high <= 1


def test_the_number_of_resamples_in_a_block_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    outcomes = [index % 4 == 0 for index in range(30)]
    whole = paired_bootstrap([False] * 30, outcomes, units=positions_as_units(30), num_resamples=1000)
    monkeypatch.setattr("rpt_lightning.evaluation.paired_bootstrap._MAX_COUNTS", 70)
    assert paired_bootstrap([False] * 30, outcomes, units=positions_as_units(30), num_resamples=1000) == whole


def test_policies_are_compared_by_task_and_not_by_order():
    both_right = compare_policies(results(FIRST, SECOND), results(SECOND, FIRST))
    assert (both_right.difference, both_right.low, both_right.high) == (0.0, 0.0, 0.0)
    assert not both_right.is_gain


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="No positions"):
        compare_policies(results(), results())
