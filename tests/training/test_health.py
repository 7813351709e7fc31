from __future__ import annotations

import pytest

from rpt_lightning.training.health import Health


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


def test_a_step_without_a_live_group_has_no_entropy():
    health = Health(window=2, min_entropy=0.1, max_equal_groups=None)
    assert [health.check(0.0, 0.0, 10.0, 0.0), health.check(0.15, 0.5, 10.0, 0.0)] == [[], []]  # the mean would be 0.075
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
