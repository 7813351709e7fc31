from __future__ import annotations

import pytest
from hand_made import POLICY, position, run, shares

from rpt_lightning.evaluation.report.figures import (
    accuracy_bars,
    all_equal_curve,
    all_figures,
    heldout_curve,
    logprob_difference,
    pattern_bars,
    pattern_curve,
    scaling,
    time_by_phase,
)  # fmt: skip
from rpt_lightning.evaluation.report.page import json_for_script
from rpt_lightning.evaluation.report.plotly_parts import colour
from rpt_lightning.metrics.interval import wilson_interval
from sample_results import results


def traces(figure):
    return figure.spec["data"]


def logged(**metrics):
    """Make a run whose metric ``a__b`` takes the given values from step 1 on."""
    number = len(next(iter(metrics.values())))
    return run(
        "<i>r</i>",
        steps={
            step + 1: {name.replace("__", "/"): values[step] for name, values in metrics.items()}
            for step in range(number)
        },
    )


def test_bars_have_heights_intervals_and_counts():
    reasoning, ntp = traces(accuracy_bars([run("one", validations=[POLICY])]))
    assert reasoning["x"] == [
        "easy<br>&gt; 0.5 nats<br>n = 4",
        "medium<br>&gt; 1.0 nats<br>n = 3",
        "hard<br>&gt; 1.5 nats<br>n = 2",
    ]
    assert reasoning["y"] == [66.667, 50.0, 0.0]
    assert ntp["y"] == [75.0, 66.667, 100.0]
    low, high = wilson_interval(3, 4)
    assert ntp["error_y"]["array"][0] == pytest.approx(100 * high - 75, abs=1e-3)
    assert ntp["error_y"]["arrayminus"][0] == pytest.approx(75 - 100 * low, abs=1e-3)
    assert ntp["customdata"][2] == "100.0 % [34.2, 100.0] 2/2"
    assert reasoning["marker"]["pattern"]["shape"] == ""
    assert ntp["marker"]["pattern"]["shape"] == "/"


def test_a_run_without_reasoning_has_one_bar_a_band():
    (bars,) = traces(accuracy_bars([run("ntp", validations=[results(position("a", 0.7, None, True))])]))
    assert bars["name"] == "ntp, NTP"
    assert accuracy_bars([run("none")]) is None


def test_names_of_runs_are_text_for_plotly():
    figures = all_figures([logged(reward__mean=[0.1, 0.2])], {"<i>r</i>": {1: shares(1)}})
    names = [trace["name"] for figure in figures for trace in traces(figure)]
    assert names
    assert all(name.startswith("&lt;i&gt;r&lt;/i&gt;") for name in names)


def test_few_steps_are_points_and_many_have_a_running_mean():
    (few,) = (figure for figure in all_figures([logged(reward__mean=[0.25, 0.5])], {"<i>r</i>": {}}))
    assert traces(few)[0]["y"] == [0.25, 0.5]
    assert few.spec["layout"]["xaxis"]["tickvals"] == [1, 2]
    (many,) = (
        figure
        for figure in all_figures(
            [logged(reward__mean=[float(step) for step in range(20)])], {"<i>r</i>": {}}
        )
    )
    faint, mean = traces(many)
    assert faint["y"][-1] == 19.0
    assert (mean["x"][0], mean["y"][0], mean["x"][-1], mean["y"][-1]) == (10, 4.5, 20, 14.5)


def test_a_value_that_is_not_finite_has_no_point():
    """JSON has no NaN, and a single one would keep a browser from reading anything on the page."""
    (figure,) = all_figures([logged(policy__entropy=[0.5, float("nan"), float("inf")])], {"<i>r</i>": {}})
    assert traces(figure)[0]["y"] == [0.5, None, None]
    assert "NaN" not in json_for_script(figure.spec)
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_for_script([float("nan")])


def test_all_equal_groups_are_those_that_are_not_live():
    (trace,) = traces(all_equal_curve([logged(rollout__live_groups_frac=[0.25, 1.0])]))
    assert trace["y"] == [75.0, 0.0]


def test_log_prob_differences_of_an_exact_engine_have_no_figure():
    assert logprob_difference([logged(sync__logprob_diff_mean=[0.0], sync__logprob_diff_max=[0.0])]) is None
    mean, largest = traces(
        logprob_difference([logged(sync__logprob_diff_mean=[0.001], sync__logprob_diff_max=[0.5])])
    )
    assert (mean["y"], mean["line"]["dash"], largest["y"], largest["line"]["dash"]) == (
        [0.001],
        "solid",
        [0.5],
        "dot",
    )


def test_phases_add_up_to_the_step():
    one = logged(
        time__step_s=[10.0, 8.0],
        time__rollout_s=[4.0, 3.0],
        time__train_s=[5.0, 4.5],
        time__sync_s=[0.5, 0.5],
    )
    phases = {trace["name"]: trace["y"] for trace in traces(time_by_phase([one], 0))}
    assert phases == {
        "rollout": [4.0, 3.0],
        "training": [5.0, 4.5],
        "weights to engine": [0.5, 0.5],
        "other": [0.5, 0.0],
    }
    assert time_by_phase([logged(reward__mean=[1.0])], 0) is None


def test_accuracy_by_step_needs_two_validations_for_scaling():
    from dataclasses import replace

    one = run("one", validations=[POLICY])
    assert scaling(one) is None
    assert len(traces(heldout_curve([one]))) == 2
    figure = scaling(run("two", validations=[POLICY, replace(POLICY, step=19)]))
    assert [trace["x"] for trace in traces(figure)] == [[7, 19]] * 6
    assert traces(figure)[0]["name"] == "easy (&gt; 0.5 nats), reasoning"
    assert traces(figure)[0]["y"] == [66.667, 66.667]


def test_runs_keep_their_colour_everywhere():
    runs = [run("one", validations=[POLICY]), run("two", validations=[POLICY])]
    assert {
        trace["line"]["color"] for trace in traces(heldout_curve(runs)) if trace["meta"] == {"run": 1}
    } == {colour(1)}
    assert colour(0) != colour(1)


def test_patterns_by_run_and_by_step():
    patterns = {"one": {1: shares(10), 9: shares(26)}, "two": {3: shares(13)}}
    one, two = traces(pattern_bars([run("one"), run("two")], patterns))
    assert (one["name"], one["y"][3], two["name"], two["y"][3]) == ("one, step 9", 26.0, "two, step 3", 13.0)
    hypothesis = traces(pattern_curve("one", patterns["one"]))[3]
    assert (hypothesis["name"], hypothesis["x"], hypothesis["y"]) == ("hypothesis", [1, 9], [10.0, 26.0])
    assert pattern_curve("two", patterns["two"]) is None
