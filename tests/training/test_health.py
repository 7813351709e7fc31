from __future__ import annotations

import pytest

from rpt_lightning.training.callbacks.health import Health


def test_each_collapse_is_said_once_and_again_after_it_came_back():
    health = Health(window=2, min_entropy=0.1, max_equal_groups=0.8, min_length=0.5, max_truncated=0.5)
    well = {"entropy": 1.0, "live_groups": 0.5, "length": 40.0, "truncated": 0.0}
    assert health.check(**well) == []
    assert health.check(**well) == []
    for worse, text in (
        ({"entropy": -1.0}, "entropy is 0.0000 nats"),  # mean of 1 and -1
        ({"live_groups": -0.4}, "95% of the groups have equal rewards"),
        ({"length": -10.0}, "completions have 15.0 tokens, 40.0 at the start"),
        ({"truncated": 1.2}, "60% of the completions run into"),
    ):
        (warning,) = health.check(**(well | worse))
        assert text in warning
        assert health.check(**(well | worse)) == []  # said already
        assert health.check(**well) == []
        assert health.check(**well) == []
        (again,) = health.check(**(well | worse))
        assert again == warning
        assert [health.check(**well), health.check(**well)] == [[], []]


WELL = {"entropy": 1.0, "live_groups": 0.5, "length": 40.0, "truncated": 0.0}


@pytest.mark.parametrize(
    ("option", "threshold", "signal", "history", "warned_at"),
    [
        # Means of two steps. At a threshold there is no warning yet; beyond it there is.
        (
            "min_entropy",
            0.5,
            "entropy",
            [1.0, 0.25, 0.75, 0.25, 0.5, 0.0],
            [4],
        ),  # 0.625, 0.5, 0.5, 0.375, 0.25
        (
            "max_equal_groups",
            0.75,
            "live_groups",
            [0.5, 0.25, 0.25, 0.125, 1.0, 0.0, 0.0],
            [3, 6],
        ),  # equal: 0.625, 0.75, 0.8125, 0.4375, 0.5, 1
        (
            "min_length",
            0.25,
            "length",
            [60.0, 20.0, 0.0, 20.0, 8.0, 8.0],
            [5],
        ),  # 40 at first; 10 is at the threshold; 14, 8
        ("max_truncated", 0.5, "truncated", [0.0, 1.0, 0.25, 0.5, 0.75], [2, 4]),  # 0.5, 0.625, 0.375, 0.625
    ],
)
def test_a_threshold_is_passed_by_its_own_signal(option, threshold, signal, history, warned_at):
    off = {"min_entropy": None, "max_equal_groups": None, "min_length": None, "max_truncated": None}
    health, silent = Health(window=2, **(off | {option: threshold})), Health(window=2, **off)
    warnings = {step: health.check(**(WELL | {signal: value})) for step, value in enumerate(history)}
    assert [step for step, texts in warnings.items() if texts] == warned_at
    assert all(f"health.{option}={threshold}" in text for texts in warnings.values() for text in texts)
    # Other signals do not affect it, and null turns it off.
    for value in history:
        assert silent.check(**(WELL | {signal: value})) == []


def test_thresholds_that_a_run_has_unless_told():
    """A healthy run gives no warning, and each collapse is noticed after 20 steps."""
    for signal, value, well in (
        ("entropy", 0.01, 0.03),
        ("live_groups", 0.04, 0.06),
        ("length", 9.0, 11.0),
        ("truncated", 0.8, 0.7),
    ):
        health = Health()
        histories = [health.check(**(WELL | {signal: WELL[signal]})) for _ in range(20)] + [
            health.check(**(WELL | {signal: well})) for _ in range(20)
        ]
        assert histories == [[]] * 40
        for _ in range(20):
            found = health.check(**(WELL | {signal: value}))
        assert len(health._warned) == 1, (signal, found)


def test_a_step_without_a_live_group_has_no_entropy():
    health = Health(window=2, min_entropy=0.1, max_equal_groups=None)
    assert [health.check(0.0, 0.0, 10.0, 0.0), health.check(0.15, 0.5, 10.0, 0.0)] == [
        [],
        [],
    ]  # the mean would be 0.075
    assert [health.check(0.0, 0.0, 10.0, 0.0), health.check(0.0, 0.0, 10.0, 0.0)] == [[], []]
    assert health.check(0.05, 0.5, 10.0, 0.0) != []


def test_a_resumed_run_knows_its_window():
    one, two = Health(window=3, min_entropy=0.1), Health(window=3, min_entropy=0.1)
    for _ in range(2):
        one.check(0.0, 0.5, 10.0, 0.0)
    two.load_state_dict(one.state_dict())
    assert one.check(0.0, 0.5, 10.0, 0.0) == two.check(0.0, 0.5, 10.0, 0.0) != []
    assert two.check(0.0, 0.5, 10.0, 0.0) == []


def test_shares_are_checked():
    with pytest.raises(ValueError, match=r"health.max_truncated=75"):
        Health(max_truncated=75)
