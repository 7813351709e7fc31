"""A user-defined reward that returns a wrong value or cannot be called gives a single error.

It names the class, what came, and what is wanted.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import Reward
from rpt_lightning.types import AnsweredTask, TokenTask

TASK = TokenTask(
    task_id="d:3",
    doc_id="d",
    position=3,
    context_ids=(1, 2, 3),
    continuation_ids=(5,),
    continuation=(b"x",),
    entropy=1.0,
    true_prob=0.1,
    true_rank=3,
    answerable=True,
)


ANSWERED = AnsweredTask(task=TASK, prompt_ids=(1, 2, 3), completions=(), predictions=(b"x", None))


class Returns(Reward):
    def __init__(self, value):
        self.value = value

    def group_rewards(self, answered):
        return self.value


def paid(value):
    return BoundObjective(NextTokenObjective(ContinuationPrompt(), Returns(value)), None).rewards(ANSWERED)


@pytest.mark.parametrize(
    "value", [(1.0, 0.0), [1.0, 0.0], (1, 0), (True, False), tuple(np.array([1.0, 0.0], dtype=np.float32))]
)
def test_numbers_are_taken_as_floats(value):
    assert paid(value) == (1.0, 0.0)
    assert all(type(reward) is float for reward in paid(value))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1.0, "float 1.0"),
        (None, "NoneType None"),
        ("10", "str '10'"),
        (torch.tensor([1.0, 0.0]), r"Tensor tensor\(\[1., 0.\]\)"),
        ({"a": 1.0}, "dict"),
        ((reward for reward in (1.0, 0.0)), "generator"),
        (("1", "0"), "str '1' among the values"),
        ((torch.tensor(1.0), 0.0), "Tensor tensor"),
        ((None, 1.0), "NoneType None among"),
        ((1.0,), "1 values"),
        ((1.0, 0.0, 0.0), "3 values"),
        ((float("nan"), 0.0), "float nan among"),
        ((float("inf"), 0.0), "float inf among"),
        ((1j, 0.0), "complex 1j among"),
    ],
)
def test_anything_else_is_one_error(value, said):
    with pytest.raises(
        ValueError,
        match=rf"the reward Returns returned {said}.*for the 2 predictions of task 'd:3'; "
        "wanted: one number per completion",
    ):
        paid(value)


def test_a_reward_that_takes_two_arguments_is_found_before_anything_is_generated():
    class TakesTwo(Reward):
        def group_rewards(self, predictions, task):
            return (1.0,) * len(predictions)

    with pytest.raises(
        ValueError,
        match=r"the reward TakesTwo has group_rewards\(predictions, task\), "
        r"which cannot be called with one argument, an AnsweredTask",
    ):
        NextTokenObjective(ContinuationPrompt(), TakesTwo())


def test_all_but_group_rewards_may_be_left_out():
    class Least(Reward):
        def group_rewards(self, answered):
            return (1.0, 0.0)

    objective = NextTokenObjective(ContinuationPrompt(), Least())
    assert not objective.needs_logprobs
    assert objective.take_metrics([]) == {}
    assert BoundObjective(objective, None).scored_sequences(ANSWERED) == ()


def test_what_a_reward_raises_goes_through():
    class Raises(Returns):
        def group_rewards(self, answered):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        BoundObjective(NextTokenObjective(ContinuationPrompt(), Raises(0)), None).rewards(ANSWERED)
