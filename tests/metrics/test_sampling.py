from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.metrics.pass_at_k import pass_at_k


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_it_is_the_share_of_all_choices_of_k_that_hold_a_right_one(case):
    num_samples, num_correct, k = case
    draws = list(combinations([True] * num_correct + [False] * (num_samples - num_correct), k))
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_it_agrees_with_the_published_code():
    """The formula is 1 - prod(1 - k / (n - c + 1), ..., 1 - k / n), or 1 if fewer than k are wrong.

    It is from Chen et al. 2021, figure 3.
    """
    for n, c, k in [(200, 3, 100), (8, 2, 4), (8, 6, 4), (10, 0, 5)]:
        expected = 1.0
        if n - c >= k:
            product = 1.0
            for i in range(n - c + 1, n + 1):
                product *= 1 - k / i
            expected = 1 - product
        assert pass_at_k(n, c, k) == pytest.approx(expected)


@pytest.mark.parametrize("case", [(4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)])
def test_impossible_numbers_are_refused(case):
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(*case)
