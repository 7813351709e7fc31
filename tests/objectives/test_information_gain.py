"""The reward of information gain (RLP, NRT), what it scores, and what it trains."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.objectives.information_gain import (
    InformationGainObjective,
    log_prob_gain,
    weighted_prob_gain,
)
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt, QuestionPrompt
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.types import AnsweredTask, Completion, RolloutGroup, TokenTask

LOGPROBS = st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1, max_size=5)


def completion_of(bound: Any, text: str, *, stop: bool = True) -> Completion:
    ids = bound.tokens.encode_plain(text)
    return Completion(
        token_ids=ids,
        text_bytes=text.encode(),
        rollout_logprobs=tuple(-0.5 - index for index in range(len(ids))),
        policy_version=0,
        finish_reason="stop" if stop else "length",
    )


def answered(bound: Any, *texts: str) -> AnsweredTask:
    truth = bound.tokens.encode_plain(" sum of all")
    task = TokenTask(
        task_id="d:2",
        doc_id="d",
        position=2,
        context_ids=bound.tokens.encode_plain("the "),
        continuation_ids=truth,
        continuation=tuple(bound.tokens[token] for token in truth),
        entropy=1.0,
        true_prob=0.5,
        true_rank=0,
        answerable=True,
    )
    completions = tuple(completion_of(bound, text) for text in texts)
    return AnsweredTask(
        task=task,
        prompt_ids=bound.prompt_ids(task),
        completions=completions,
        predictions=tuple(map(bound.prediction, completions)),
    )


@pytest.fixture
def bound(tiny_tokenizer):
    return InformationGainObjective(ContinuationPrompt()).bind(tiny_tokenizer)


@pytest.fixture
def boxed(tiny_tokenizer):
    return InformationGainObjective(ContinuationPrompt(), boxed=True).bind(tiny_tokenizer)


def test_rewards_by_hand(bound) -> None:
    group = replace(
        answered(bound, "a</think> x", "b</think> y"),
        logprobs=((math.log(1 / 8),), (math.log(1 / 2),), (math.log(1 / 16),)),
    )
    assert bound.rewards(group) == pytest.approx((math.log(4), -math.log(2)))


def test_weighted_rewards_by_hand() -> None:
    # Surprises log 4 and log 2: weights 2/3 and 1/3. Gains 1/2 - 1/4 and 1/8 - 1/2.
    without, after = [math.log(1 / 4), math.log(1 / 2)], [math.log(1 / 2), math.log(1 / 8)]
    assert weighted_prob_gain(after, without) == pytest.approx(2 / 3 / 4 - 3 / 8 / 3)
    assert weighted_prob_gain([math.log(0.9)], [math.log(0.5)]) == pytest.approx(0.4)
    assert weighted_prob_gain([math.log(0.1)], [math.log(0.5)]) == 0.0
    assert weighted_prob_gain([-1.0], [0.0]) == 0.0  # a certain token has no weight


@given(LOGPROBS)
def test_gains(pairs: list[tuple[float, float]]) -> None:
    after, without = zip(*pairs, strict=True)
    assert log_prob_gain(after, without) == pytest.approx(sum(after) - sum(without), abs=1e-9)
    assert log_prob_gain(after, without) == -log_prob_gain(without, after)
    assert 0.0 <= weighted_prob_gain(after, without) <= 1.0
    assert log_prob_gain(after, after) == weighted_prob_gain(after, after) == 0.0


@given(st.lists(st.floats(-20, 5), min_size=2, max_size=8), st.floats(-20, 0), st.floats(-20, 0))
def test_the_moving_average_cancels(rewards: list[float], own: float, average: float) -> None:
    """RLP's advantages do not depend on which model says how likely the truth is without a thought."""
    from rpt_lightning.algo.advantage import group_advantages

    exact = torch.tensor([rewards], dtype=torch.float64)
    torch.testing.assert_close(
        group_advantages(exact - own, scale="rloo"),
        group_advantages(exact - average, scale="rloo"),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize(("gains", "least"), [((2.0, -3.0), -3.0), ((2.0, 1.0), 0.0), ((), 0.0)])
def test_an_unclosed_thought_earns_the_least_and_at_most_0(bound, gains, least) -> None:
    texts = [f"a</think> {index}" for index in range(len(gains))]
    group = answered(bound, *texts, "never closed")
    assert bound.scored_sequences(group)[-1] is None
    logprobs = ((-5.0,), *((gain - 5.0,) for gain in gains), None)
    assert bound.rewards(replace(group, logprobs=logprobs)) == pytest.approx((*gains, least))


def test_what_is_scored(bound, boxed) -> None:
    for objective, opened in ((bound, "</think>"), (boxed, "</think>\\boxed{")):
        group = answered(objective, "so</think> whatever")
        without, after = objective.scored_sequences(group)
        truth = group.task.continuation_ids[:1]
        assert (without.prompt_ids, without.target_ids) == (
            objective.start_ids + group.task.context_ids,
            truth,
        )
        assert after.target_ids == truth
        assert after.prompt_ids[: len(group.prompt_ids)] == group.prompt_ids
        assert objective.tokens.join(after.prompt_ids[len(group.prompt_ids) :]) == f"so{opened}".encode()


def test_several_true_tokens(tiny_tokenizer) -> None:
    bound = InformationGainObjective(ContinuationPrompt(), num_tokens=3).bind(tiny_tokenizer)
    group = answered(bound, "so</think> a")
    ids = group.task.continuation_ids
    assert {sequence.target_ids for sequence in bound.scored_sequences(group)} == {ids[:3]}
    # More tokens than a box can hold come from the document itself.
    longer = replace(group, task=replace(group.task, continuation_ids=ids[:1], following_ids=ids))
    assert bound.scored_sequences(longer)[0].target_ids == ids[:3]
    assert bound.objective.num_following_tokens == 3
    # What is right does not depend on it.
    assert bound.direct_sequence(group.task).target_ids == ids[:1]


def test_an_empty_thought_after_the_same_tokens_gains_nothing(boxed) -> None:
    """If the template adds nothing, thinking nothing is the plain context: the same sequence, gain 0."""
    boxed.prompt = replace(boxed.prompt, suffix_ids=(), answer_open_ids=())
    group = answered(boxed, "</think>")
    without, after = boxed.scored_sequences(group)
    assert without == after
    assert boxed.rewards(replace(group, logprobs=((-3.0,), (-3.0,)))) == (0.0,)


def test_only_the_thought_and_its_marker_are_trained(bound) -> None:
    group = answered(bound, "so it is</think> sum", "never closed")
    num_trained = tuple(map(bound.num_trained, group.completions))
    rolled_out = RolloutGroup(
        task=group.task,
        prompt_ids=group.prompt_ids,
        completions=group.completions,
        predictions=group.predictions,
        rewards=(1.0, 0.0),
        num_trained=num_trained,
    )
    (first, _), (second, _) = rolled_out.trained
    assert bound.tokens.join(first.token_ids) == b"so it is</think>"
    assert first.rollout_logprobs == group.completions[0].rollout_logprobs[: len(first.token_ids)]
    assert second == group.completions[1]


def test_held_out_accuracy_is_that_of_the_next_token(bound, boxed, tiny_tokenizer) -> None:
    ordinary = NextTokenObjective(ContinuationPrompt(), PrefixMatchReward()).bind(tiny_tokenizer)
    task = answered(bound).task
    first = b"".join(bound.truth(task)[:1]).decode()
    for objective, text in ((bound, f"so</think>{first}"), (boxed, f"so</think>\\boxed{{{first}}}")):
        prediction = objective.prediction(completion_of(objective, text))
        assert prediction == first.encode()
        assert objective.is_right(prediction, task)
        assert not objective.is_right(prediction + b"x", task)
        assert objective.prediction(completion_of(objective, text, stop=False)) is None
        assert objective.prediction(completion_of(objective, "never closed")) is None
        assert objective.direct_sequence(task) == ordinary.direct_sequence(task)
        assert objective.objective.places == ordinary.objective.places
    assert bound.objective.read_answer(b" sum") == b" sum"
    assert boxed.objective.read_answer(b" sum} and") == b" sum"


def test_refused_options() -> None:
    with pytest.raises(ValueError, match="num_tokens 0: give 1"):
        InformationGainObjective(ContinuationPrompt(), num_tokens=0)
    with pytest.raises(ValueError, match="think_close null"):
        InformationGainObjective(ContinuationPrompt(think_open=None, think_close=None))
    with pytest.raises(ValueError, match="InformationGainObjective cannot use QuestionPrompt"):
        InformationGainObjective(QuestionPrompt())
