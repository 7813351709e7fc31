from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rpt_lightning.tasks.reward import (
    ConditionalDenseReward,
    DenseReward,
    FirstTokenReward,
    PrefixMatchReward,
    first_token_match,
    prefix_match,
)
from rpt_lightning.types import TokenTask

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
    assert FirstTokenReward().group_rewards(predictions, task_of(b" the", b" sum")) == (
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
    assert PrefixMatchReward().group_rewards(predictions, task_of(b" the", b" sum")) == (
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
    )


def test_dense_rewards() -> None:
    task = task_of(b" the", b" sum")
    predictions, probs = (b" the", b" a", b"", None), (0.6, 0.25, 0.5, 0.5)
    assert DenseReward().group_rewards(predictions, task, probs) == (1.0, 0.25, 0.0, 0.0)
    assert ConditionalDenseReward().group_rewards(predictions, task, probs) == (1.0, 0.25, 0.0, 0.0)
    assert DenseReward().group_rewards(predictions[1:], task, probs[1:]) == (0.25, 0.0, 0.0)
    assert ConditionalDenseReward().group_rewards(predictions[1:], task, probs[1:]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("reward", [DenseReward(), ConditionalDenseReward()])
def test_dense_rewards_ask_for_probabilities(reward) -> None:
    assert reward.needs_first_token_probs
    assert not PrefixMatchReward().needs_first_token_probs
    assert not FirstTokenReward().needs_first_token_probs
    with pytest.raises(AssertionError):
        reward.group_rewards((b"a",), task_of(b"a"))
