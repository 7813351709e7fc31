from __future__ import annotations

import json
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


@pytest.mark.parametrize("scale", ["std", "none"])
def test_parity_with_verl(scale) -> None:
    ours = group_advantages(torch.tensor(VERL["rewards"], dtype=torch.float64), scale=scale)
    torch.testing.assert_close(
        ours, torch.tensor(VERL["advantages"][scale], dtype=torch.float64), rtol=0, atol=1e-9
    )


@given(st.floats(0, 1), st.integers(2, 9))
@example(0.1, 3)
def test_equal_rewards_teach_exactly_nothing(reward: float, group_size: int) -> None:
    assert not group_advantages(torch.full((1, group_size), reward, dtype=torch.float64)).any()


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
