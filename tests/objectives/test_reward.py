from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import (
    ConditionalDenseReward,
    DenseReward,
    FirstTokenReward,
    PrefixMatchReward,
    first_token_match,
    prefix_match,
)
from rpt_lightning.types import AnsweredTask, TokenTask

TOKENS = st.lists(
    st.sampled_from([b"a", b"ab", b" ", b"\n", b"\xf0\x9f", b"\x98\x80", b"{", b"}", b""]), max_size=8
)


def task_of(*continuation: bytes) -> TokenTask:
    return TokenTask(
        task_id="d:1",
        doc_id="d",
        position=1,
        context_ids=(1,),
        continuation_ids=tuple(range(len(continuation))),
        continuation=continuation,
        entropy=1.0,
        true_prob=0.5,
        true_rank=0,
        answerable=True,
    )


def answered(predictions: Sequence[bytes | None], *continuation: bytes) -> AnsweredTask:
    return AnsweredTask(
        task=task_of(*continuation), prompt_ids=(1,), completions=(), predictions=tuple(predictions)
    )


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (b" 4", 1.0),
        (b" 4.", 1.0),
        (b" 4.\xf0\x9f", 1.0),  # it ends inside a character, but on a token boundary
        (b" 4.\xf0\x9f\x98\x80", 1.0),
        (b" 4.\xf0", 0.0),
        (b" ", 0.0),
        (b"4", 0.0),
        (b" 4 ", 0.0),
        (b" 4.\xf0\x9f\x98\x80!", 0.0),
        (b"", 0.0),
    ],
)
def test_prefix_match_by_hand(prediction: bytes, expected: float) -> None:
    assert prefix_match(prediction, [b" 4", b".", b"\xf0\x9f", b"\x98\x80"]) == expected


@given(st.binary(max_size=6), TOKENS)
@example(b"", [b""])
def test_prefix_match_is_the_papers_equation(prediction: bytes, continuation: list[bytes]) -> None:
    """r = 1 iff b(y) is the continuation's first l bytes, with l a cumulative byte length of its tokens."""
    lengths = {len(b"".join(continuation[:n])) for n in range(1, len(continuation) + 1)}
    expected = (
        bool(prediction)
        and len(prediction) in lengths
        and b"".join(continuation)[: len(prediction)] == prediction
    )
    assert prefix_match(prediction, continuation) == float(expected)


@given(TOKENS, st.integers(0, 8))
def test_every_boundary_is_right_and_is_a_first_token_match(continuation: list[bytes], length: int) -> None:
    prediction = b"".join(continuation[:length])
    assert prefix_match(prediction, continuation) == float(bool(prediction))
    if prediction and continuation[0]:
        assert first_token_match(prediction, continuation) == 1.0


def test_first_token_reward() -> None:
    predictions = (b" the", b" the sum", b" the wrong", b" theory", b" th", b"the", b"", None)
    assert FirstTokenReward().group_rewards(answered(predictions, b" the", b" sum")) == (
        1.0,
        1.0,
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
    )


def test_prefix_reward() -> None:
    predictions = (b" the", b" the sum", b" the wrong", b" theory", None, b"")
    assert PrefixMatchReward().group_rewards(answered(predictions, b" the", b" sum")) == (
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
    )


def test_dense_rewards() -> None:
    predictions, probs = (b" the", b" a", b"", None), (0.6, 0.25, None, None)
    logprobs = tuple(None if prob is None else (math.log(prob),) for prob in probs)
    group = replace(answered(predictions, b" the", b" sum"), logprobs=logprobs)
    assert DenseReward().group_rewards(group) == pytest.approx((1.0, 0.25, 0.0, 0.0))
    assert ConditionalDenseReward().group_rewards(group) == pytest.approx((1.0, 0.25, 0.0, 0.0))
    wrong = replace(group, predictions=predictions[1:], logprobs=logprobs[1:])
    assert DenseReward().group_rewards(wrong) == pytest.approx((0.25, 0.0, 0.0))
    assert ConditionalDenseReward().group_rewards(wrong) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("reward", [DenseReward(), ConditionalDenseReward()])
def test_dense_rewards_ask_for_the_first_token_after_the_plain_context(reward, tiny_tokenizer) -> None:
    assert reward.needs_logprobs
    assert not PrefixMatchReward().needs_logprobs
    assert not FirstTokenReward().needs_logprobs
    bound = NextTokenObjective(ContinuationPrompt(), reward).bind(tiny_tokenizer)
    group = answered((b" the sum", b"", None, b"\xff"), b" a")
    first, *others = bound.scored_sequences(group)
    assert others == [None, None, None]
    assert first.prompt_ids == bound.start_ids + group.task.context_ids
    assert first.target_ids == bound.tokens.encode_plain(" the sum")[:1]
    with pytest.raises(ValueError, match="zip"):
        reward.group_rewards(replace(group, predictions=(b" a",)))
