"""The fit recovers a known scaling law, and its intervals contain it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_lightning.evaluation.scaling.law import bootstrap_scaling, compare_laws, fit_scaling

STEPS = np.array([100, 200, 400, 800, 1000, 1200])  # the paper's checkpoints


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 3.0), st.floats(-0.2, -0.005), st.floats(0.2, 0.6), st.floats(1e12, 1e22))
def test_an_exact_law_is_found_again(alpha, amplitude, limit, flops_per_step):
    compute = STEPS * flops_per_step
    fit = fit_scaling(compute, amplitude * (compute / compute.max()) ** -alpha + limit)
    assert fit.alpha == pytest.approx(alpha, rel=1e-3)
    assert fit.amplitude == pytest.approx(amplitude, rel=1e-3)
    assert fit.limit == pytest.approx(limit, abs=1e-3)
    assert fit.r_squared == pytest.approx(1.0, abs=1e-9)


def test_hand_computed():
    """The law is 0.5 - 0.1 / C at C = 1, 2, 4, 5. A is -0.1 at C = 1, so -0.02 at the largest compute."""
    fit = fit_scaling([1, 2, 4, 5], [0.4, 0.45, 0.475, 0.48])
    assert (fit.alpha, fit.amplitude, fit.limit) == (
        pytest.approx(1.0, abs=1e-4),
        pytest.approx(-0.02, abs=1e-5),
        pytest.approx(0.5, abs=1e-5),
    )
    assert fit.predict([10.0]) == pytest.approx([0.49], abs=1e-5)


def test_r_squared_is_the_explained_share():
    values = np.array([0.40, 0.46, 0.47, 0.48, 0.485])
    fit = fit_scaling([1, 2, 3, 4, 5], values)
    residual = ((fit.predict([1, 2, 3, 4, 5]) - values) ** 2).sum()
    assert fit.r_squared == pytest.approx(1 - residual / ((values - values.mean()) ** 2).sum())
    assert 0.9 < fit.r_squared < 1


def test_intervals_cover_the_truth_and_follow_the_documents():
    rng = np.random.default_rng(0)
    truth = 0.45 - 0.02 * (STEPS / STEPS.max()) ** -0.8  # [C] from 0.30 up to 0.43
    thresholds = np.repeat(
        rng.permutation((np.arange(200) + 0.5) / 200), 10
    )  # the positions of a document agree
    correct = thresholds[None, :] < truth[:, None]
    units = [f"doc-{number // 10}" for number in range(2000)]
    by_document = bootstrap_scaling(STEPS, correct, units, num_resamples=200)
    by_position = bootstrap_scaling(
        STEPS, correct, [str(number) for number in range(2000)], num_resamples=200
    )
    assert by_document.num_units == 200
    assert ((by_document.curve_low < truth) & (truth < by_document.curve_high)).all()
    # Ten positions that always agree carry the information of one, so the interval is about sqrt(10) as wide.
    ratio = (by_document.curve_high - by_document.curve_low)[-1] / (
        by_position.curve_high - by_position.curve_low
    )[-1]
    assert 2.3 < ratio < 4.3


def test_what_the_checkpoints_do_not_determine_is_no_law():
    """A line in log C has no limit, and equal accuracies have nothing to explain.

    An exact law with its bend in the middle is determined.
    """
    assert fit_scaling([1, 2, 4, 8], [0.5 - 0.1 / c for c in (1, 2, 4, 8)]).doubt is None
    assert fit_scaling([1, 2, 4, 8], [0.4 + 0.1 / c for c in (1, 2, 4, 8)]).doubt == "accuracy falls"
    straight = fit_scaling([1, 10, 100, 1000], [0.1, 0.2, 0.3, 0.4])
    assert straight.r_squared > 0.999
    assert straight.doubt == "alpha is at an end of the search range"
    constant = fit_scaling([1, 2, 4, 8], [0.25] * 4)
    assert math.isnan(constant.r_squared)
    assert constant.doubt == "all accuracies are equal"


def test_a_law_that_other_documents_would_not_show_is_doubted():
    """Four checkpoints rise by chance. The best fit looks like a law, but the resampled ones vary widely."""
    rng = np.random.default_rng(1)
    correct = rng.random((4, 400)) < np.array([0.26, 0.271, 0.276, 0.279])[:, None]
    interval = bootstrap_scaling(
        [1, 2, 3, 4], correct, [str(number // 10) for number in range(400)], num_resamples=200
    )
    assert interval.doubt is not None
    steep = np.arange(4000) / 4000 < (0.5 - 0.2 * np.array([1.0, 2, 4, 8, 16, 32]) ** -1.5)[:, None]
    interval = bootstrap_scaling(
        [1, 2, 4, 8, 16, 32], steep, [str(number) for number in rng.permutation(4000)], num_resamples=200
    )
    assert interval.doubt is None


@pytest.mark.parametrize(("compute", "message"), [([1, 2, 2, 3], "got 3"), ([0, 1, 2, 3], "above 0")])
def test_too_little_to_fit_is_one_clear_error(compute, message):
    with pytest.raises(ValueError, match=message):
        fit_scaling(compute, [0.1, 0.2, 0.3, 0.4])


def test_the_law_that_made_the_points_is_found():
    """Each law describes its own points best, with the noise of a few hundred positions."""
    compute = np.geomspace(1e10, 1e12, 16)
    relative = compute / compute.max()
    noise = np.random.default_rng(0).normal(scale=0.01, size=16)
    made = {
        "power": 0.9 - 0.1 * relative**-0.5,
        "exponential": 0.9 - 0.6 * np.exp(-relative / 0.2),
        "logarithm": 0.6 + 0.1 * np.log(relative),
    }
    for name, accuracy in made.items():
        criteria = compare_laws(compute, accuracy + noise)
        assert min(criteria, key=criteria.__getitem__) == name, criteria


def test_akaike_hand_computed():
    """The line through 0, 0.1, 0.2, 0.4 in log2 C has slope 0.13, offset -0.02 and squared residual 0.003.

    Four points are too few for 3 parameters and the noise.
    """
    criteria = compare_laws([1, 2, 4, 8], [0.0, 0.1, 0.2, 0.4])
    assert criteria["power"] == criteria["exponential"] == math.inf
    assert criteria["logarithm"] == math.inf  # 2 parameters and the noise need 5 points
    six = compare_laws([1, 2, 4, 8, 16, 32], [0.0, 0.1, 0.2, 0.3, 0.4, 0.6])
    residual = sum(
        (value - (0.11428571 * k - 0.01904762)) ** 2 for k, value in enumerate([0.0, 0.1, 0.2, 0.3, 0.4, 0.6])
    )
    assert six["logarithm"] == pytest.approx(6 * math.log(residual / 6) + 2 * 3 + 2 * 3 * 4 / 2, abs=1e-4)
