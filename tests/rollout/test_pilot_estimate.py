r"""What pilots do to the gradient estimate, computed by enumeration. These are the numbers of docs/pilot.md.

Rewards are 0 or 1. The completions of a task are right with probability p, independently. Given its reward, a
completion has the usual distribution, whatever was selected by rewards. With
:math:`s_r = E[\\nabla\\log\\pi(y) | r]` and :math:`s_1 - s_0 = \\nabla p / (p (1 - p))`, a group with k right
completions of m contributes :math:`\\sum_i A_i s_{r_i} = w(k, m) \\nabla p / (p (1 - p))`. This is always
along the task's own gradient. The weight of a task is the factor before its gradient of p.
"""

from __future__ import annotations

import random
from math import comb

import pytest
import torch

from rpt_lightning.algo.advantage import group_advantages

G = 8


def binomial(k: int, n: int, p: float) -> float:
    return comb(n, k) * p**k * (1 - p) ** (n - k)


def share(k: int, scale: str) -> float:
    """Compute w(k, G), the sum of the advantages of right completions, with the function used in training.

    The sum over wrong completions is its negative.
    """
    rewards = torch.tensor([[1.0] * k + [0.0] * (G - k)], dtype=torch.float64)
    return group_advantages(rewards, scale=scale)[0, :k].sum().item()


def full_weight(p: float, scale: str) -> float:
    return sum(binomial(k, G, p) * share(k, scale) for k in range(G + 1)) / (p * (1 - p))


def pilot_weight(p: float, scale: str, n0: int) -> float:
    mixed = [(j, more) for j in range(1, n0) for more in range(G - n0 + 1)]
    return sum(
        binomial(j, n0, p) * binomial(more, G - n0, p) * share(j + more, scale) for j, more in mixed
    ) / (p * (1 - p))


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9])
def test_without_pilot_every_task_counts_alike(p: float) -> None:
    """With the group mean as baseline, every task's gradient is scaled by the same factor (G - 1) / G.

    The expected step is therefore along the gradient of mean p.
    """
    assert full_weight(p, "none") == pytest.approx(G - 1)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9])
def test_a_pilot_of_two_shifts_weight_towards_even_chances(p: float) -> None:
    """The weight by hand: one of two is right in 2 p (1 - p) of the cases, times E[(1 + m)(G - 1 - m)].

    Here m ~ Binomial(G - 2, p).
    """
    by_hand = 2 / G * (G - 1 + (G - 2) * (G - 3) * p * (1 - p))
    assert pilot_weight(p, "none", 2) == pytest.approx(by_hand)


def test_the_numbers_of_the_decision() -> None:
    """docs/pilot.md shows these."""
    chances = (0.02, 0.1, 0.3, 0.5)
    table = {
        (scale, n0): [round(pilot_weight(p, scale, n0) / full_weight(p, scale), 2) for p in chances]
        for scale in ("none", "std")
        for n0 in (2, 4)
    }
    assert table == DECISION


DECISION = {
    ("none", 2): [0.27, 0.35, 0.48, 0.52],
    ("none", 4): [0.53, 0.65, 0.84, 0.9],
    ("std", 2): [0.27, 0.33, 0.46, 0.51],
    ("std", 4): [0.53, 0.63, 0.82, 0.89],
}


def test_the_shift_grows_with_p_times_1_minus_p_and_no_gradient_turns_round() -> None:
    for n0 in range(2, G):
        for scale in ("none", "std"):
            ratios = [pilot_weight(p / 100, scale, n0) / full_weight(p / 100, scale) for p in range(1, 51)]
            assert ratios == sorted(ratios)
            assert 0 < ratios[0] < ratios[-1] < 1


def test_the_baseline_of_a_filled_group_is_not_p() -> None:
    """E[r | filled] leans towards one half.

    For n0 = 2 it is computed by hand, since exactly one completion of the pilot is right.
    """
    p, n0 = 0.1, 2
    weights = {
        (j, more): binomial(j, n0, p) * binomial(more, G - n0, p)
        for j in range(1, n0)
        for more in range(G - n0 + 1)
    }
    mean = sum(weight * (j + more) / G for (j, more), weight in weights.items()) / sum(weights.values())
    assert mean == pytest.approx((1 + (G - n0) * p) / G) == pytest.approx(0.2)


def test_sampled_groups_agree_with_the_enumeration() -> None:
    """Check by Monte Carlo with a policy of one parameter, whose logits are theta (right) and 0 (wrong).

    The gradient of the log-prob is r - p, and that of p is p (1 - p).
    """
    draw, p, n0, total, rounds = random.Random(0), 0.2, 3, 0.0, 40_000
    for _ in range(rounds):
        rewards = [float(draw.random() < p) for _ in range(G)]
        if len(set(rewards[:n0])) > 1:
            baseline = sum(rewards) / G
            total += sum((reward - baseline) * (reward - p) for reward in rewards)
    assert total / rounds / (p * (1 - p)) == pytest.approx(pilot_weight(p, "none", n0), rel=0.02)


def mixed(p: float, n: int) -> float:
    """Return the probability that n completions are not all alike."""
    return 1 - p**n - (1 - p) ** n


def gain(p: float, n0: int, hopeless: float) -> float:
    """Return the live groups per sampled completion with a pilot, relative to those without.

    A share of the tasks is always or never right.
    """
    with_pilot = (1 - hopeless) * mixed(p, n0) / (n0 + (1 - hopeless) * mixed(p, n0) * (G - n0))
    return with_pilot / ((1 - hopeless) * mixed(p, G) / G)


def test_a_pilot_pays_only_where_many_tasks_are_hopeless() -> None:
    """docs/pilot.md shows these."""
    assert [
        [round(gain(p, 4, hopeless), 2) for p in (0.1, 0.3, 0.5)] for hopeless in (0.0, 0.5, 0.8)
    ] == GAINS
    # If every task has the same chance, a pilot always loses. It saves completions only on tasks that are
    # always or never right.
    assert all(gain(p / 100, n0, 0.0) <= 1 for p in range(1, 51) for n0 in range(2, G))


GAINS = [[0.9, 0.91, 0.94], [1.03, 1.16, 1.23], [1.13, 1.39, 1.5]]
