from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from rpt_lightning.algo.advantage import group_advantages

VERL = json.loads((Path(__file__).parent / "goldens/verl.json").read_text())


def test_hand_computed() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    # Mean 1/4; unbiased variance ((3/4)^2 + 3 (1/4)^2) / 3 = 1/4.
    assert group_advantages(rewards, eps=0.0).tolist() == [[1.5, -0.5, -0.5, -0.5]]
    assert group_advantages(rewards, eps=0.5).tolist() == [[0.75, -0.25, -0.25, -0.25]]
    assert group_advantages(rewards, scale="none").tolist() == [[0.75, -0.25, -0.25, -0.25]]


@pytest.mark.parametrize(
    ("scale", "num_right", "right", "wrong"),
    [  # the table of docs/objectives.md
        ("std", 1, 7 / 8 * math.sqrt(8), -1 / 8 * math.sqrt(8)),  # variance 1/8
        ("std", 4, 0.5 * math.sqrt(7 / 2), -0.5 * math.sqrt(7 / 2)),  # variance 2/7
        ("std", 7, 1 / 8 * math.sqrt(8), -7 / 8 * math.sqrt(8)),
        ("none", 1, 7 / 8, -1 / 8),
        ("none", 4, 1 / 2, -1 / 2),
        ("none", 7, 1 / 8, -7 / 8),
        ("rloo", 1, 1.0, -1 / 7),
        ("rloo", 4, 4 / 7, -4 / 7),
        ("rloo", 7, 1 / 7, -1.0),
        ("maxrl", 1, 7.0, -1.0),
        ("maxrl", 4, 1.0, -1.0),
        ("maxrl", 7, 1 / 7, -1.0),
    ],
)
def test_hard_and_easy_tasks_by_hand(scale, num_right, right, wrong) -> None:
    rewards = torch.tensor([[1.0] * num_right + [0.0] * (8 - num_right)], dtype=torch.float64)
    expected = [right] * num_right + [wrong] * (8 - num_right)
    assert group_advantages(rewards, scale=scale, eps=0.0)[0].tolist() == pytest.approx(expected)


def test_graded_rewards_by_hand() -> None:
    rewards = torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64)  # mean 1; without the first 0, else 3/2
    assert group_advantages(rewards, scale="rloo").tolist() == [[3.0, -1.5, -1.5]]
    assert group_advantages(rewards, scale="maxrl").tolist() == [[2.0, -1.0, -1.0]]


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=8))
def test_rloo_compares_with_the_mean_of_the_others(rewards: list[float]) -> None:
    advantages = group_advantages(torch.tensor([rewards], dtype=torch.float64), scale="rloo")[0].tolist()
    others = [(sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
    assert advantages == pytest.approx(
        [reward - other for reward, other in zip(rewards, others, strict=True)], abs=1e-9
    )


@given(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=2, max_size=8), st.floats(0.1, 9))
def test_maxrl_does_not_depend_on_the_unit_of_rewards(rewards: list[float], unit: float) -> None:
    exact = torch.tensor([rewards], dtype=torch.float64)
    advantages = group_advantages(exact, scale="maxrl")
    torch.testing.assert_close(group_advantages(exact * unit, scale="maxrl"), advantages, rtol=0, atol=1e-9)
    assert advantages.min() >= -1.0


@pytest.mark.parametrize(
    ("scale", "weight"),
    [("none", lambda p: 3 / 4), ("rloo", lambda p: 1.0), ("maxrl", lambda p: (1 - (1 - p) ** 3) / p)],
)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_what_a_task_counts(scale, weight, p: float) -> None:
    """The expected gradient of a policy that is right with probability p, over all groups of 4.

    In p, the log-prob of a right completion has the derivative 1 / p, that of a wrong one -1 / (1 - p). The
    derivative of p itself is 1. With "maxrl", groups with a right completion give 1 / p less the mean of all
    derivatives, and the others 0: (1 - (1 - p)^4) / p - (1 - p)^4 / (1 - p), which is (1 - (1 - p)^3) / p.
    """
    total = 0.0
    for right in itertools.product([0.0, 1.0], repeat=4):
        rewards = torch.tensor([right], dtype=torch.float64)
        probability = math.prod(p if one else 1 - p for one in right)
        scores = torch.tensor([1 / p if one else -1 / (1 - p) for one in right], dtype=torch.float64)
        total += probability * (group_advantages(rewards, scale=scale)[0] * scores).mean().item()
    assert total == pytest.approx(weight(p))


@pytest.mark.parametrize("scale", ["std", "none"])
def test_parity_with_verl(scale) -> None:
    ours = group_advantages(torch.tensor(VERL["rewards"], dtype=torch.float64), scale=scale)
    torch.testing.assert_close(
        ours, torch.tensor(VERL["advantages"][scale], dtype=torch.float64), rtol=0, atol=1e-9
    )


@given(st.floats(0, 1), st.integers(2, 9), st.sampled_from(["std", "none", "rloo", "maxrl"]))
@example(0.1, 3, "std")
@example(0.0, 3, "maxrl")
def test_equal_rewards_teach_exactly_nothing(reward: float, group_size: int, scale) -> None:
    rewards = torch.full((1, group_size), reward, dtype=torch.float64)
    assert group_advantages(rewards, scale=scale).tolist() == [[0.0] * group_size]


@given(st.lists(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=4, max_size=4), min_size=2, max_size=5))
def test_groups_do_not_see_each_other(rewards: list[list[float]]) -> None:
    whole = group_advantages(torch.tensor(rewards))
    assert torch.equal(whole, torch.cat([group_advantages(torch.tensor([row])) for row in rewards]))
    torch.testing.assert_close(whole.sum(dim=1), torch.zeros(len(rewards)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1), (4,)])
def test_a_group_of_one_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="group_size"):
        group_advantages(torch.ones(shape))


def test_unknown_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="'var'"):
        group_advantages(torch.ones(1, 2), scale="var")  # type: ignore[arg-type]


def test_maxrl_refuses_negative_rewards() -> None:
    with pytest.raises(ValueError, match=r"model\.advantage_scale=maxrl: a completion earned -0\.5.*rloo"):
        group_advantages(torch.tensor([[1.0, -0.5]]), scale="maxrl")
