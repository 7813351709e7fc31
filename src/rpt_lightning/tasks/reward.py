"""The reward of a prediction, compared as bytes.

These are the prefix-matching reward and the three that the paper compares it with (RPT, sections 3.2 and 4).

Notation: ``y`` is the prediction, ``x_t x_{t+1} ...`` are the ground-truth tokens from the position on, and
``b(.)`` are their bytes. A missing or empty prediction earns 0 from every reward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from rpt_lightning.types import Task, TokenTask


def prefix_match(prediction: bytes, continuation: Sequence[bytes]) -> float:
    """Return 1 iff ``b(y)`` is a prefix of ``b(x_t x_{t+1} ...)`` that ends on a token boundary, else 0.

    This is equation 3 of RPT. ``continuation`` holds the bytes of each ground-truth token in order. A
    prediction is wrong if it is empty or extends beyond ``continuation``.

    >>> predictions = (b" the", b" the sum", b" the s", b"the")
    >>> [prefix_match(prediction, [b" the", b" sum"]) for prediction in predictions]
    [1.0, 1.0, 0.0, 0.0]
    """
    length = 0
    for token in continuation:
        if length >= len(prediction):
            break
        if not prediction.startswith(token, length):
            return 0.0
        length += len(token)
    return float(length == len(prediction) > 0)


def first_token_match(prediction: bytes, continuation: Sequence[bytes]) -> float:
    """Return 1 iff ``b(y)`` starts with ``b(x_t)``, else 0.

    Bytes do not show how ``y`` would be tokenised. With the truth " the", the prediction " theory" matches
    too, although its own first token may be " theory". A prediction fails only if it ends inside the first
    token or differs from it.

    >>> predictions = (b" the", b" the product", b" th")
    >>> [first_token_match(prediction, [b" the", b" sum"]) for prediction in predictions]
    [1.0, 1.0, 0.0]
    """
    return float(bool(continuation) and len(continuation[0]) > 0 and prediction.startswith(continuation[0]))


class Reward(ABC):
    """The rewards of one task's completions. A reward may depend on the whole group."""

    needs_first_token_probs: bool
    """Whether ``group_rewards`` needs the policy's own probability of each prediction's first token."""

    @abstractmethod
    def group_rewards(
        self,
        predictions: Sequence[bytes | None],
        task: Task,
        first_token_probs: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        """Return one reward per prediction, in order.

        ``first_token_probs[i]`` is ``P(y0 | x_<t)``, the probability of the first token of prediction ``i``.
        It comes from the policy when asked for the next token directly, without a thought. It is not read if
        the prediction is missing or empty. The argument is None unless ``needs_first_token_probs``.
        """


class PrefixMatchReward(Reward):
    """``r_i = prefix_match(y_i, x_>=t)``, the reward of the main runs (RPT, equation 3)."""

    needs_first_token_probs = False

    def group_rewards(
        self,
        predictions: Sequence[bytes | None],
        task: Task,
        first_token_probs: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        return tuple(
            0.0 if prediction is None else prefix_match(prediction, _continuation(task))
            for prediction in predictions
        )


class FirstTokenReward(Reward):
    """``r_i = 1[b(y_i) starts with b(x_t)]``. Only the first token must match (RPT's ablation)."""

    needs_first_token_probs = False

    def group_rewards(
        self,
        predictions: Sequence[bytes | None],
        task: Task,
        first_token_probs: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        return _first_token_rewards(predictions, task)


class DenseReward(Reward):
    """``r_i = 1`` if the first token matches, else ``P(y0_i | x_<t)`` (RPT's ablation).

    A likely guess earns a small reward.
    """

    needs_first_token_probs = True

    def group_rewards(
        self,
        predictions: Sequence[bytes | None],
        task: Task,
        first_token_probs: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        return _dense_rewards(predictions, task, first_token_probs)


class ConditionalDenseReward(Reward):
    """The dense reward if at least one first token of the group matches, else 0 (RPT's ablation)."""

    needs_first_token_probs = True

    def group_rewards(
        self,
        predictions: Sequence[bytes | None],
        task: Task,
        first_token_probs: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        if not any(_first_token_rewards(predictions, task)):
            return (0.0,) * len(predictions)
        return _dense_rewards(predictions, task, first_token_probs)


def _continuation(task: Task) -> tuple[bytes, ...]:
    if not isinstance(task, TokenTask):
        raise ValueError(
            f"task {task.task_id!r} is a question, and this reward is for next-token predictions; "
            "give --rollout.objective.reward AnswerReward"
        )
    return task.continuation


def _first_token_rewards(predictions: Sequence[bytes | None], task: Task) -> tuple[float, ...]:
    return tuple(
        0.0 if prediction is None else first_token_match(prediction, _continuation(task))
        for prediction in predictions
    )


def _dense_rewards(
    predictions: Sequence[bytes | None], task: Task, first_token_probs: Sequence[float] | None
) -> tuple[float, ...]:
    assert first_token_probs is not None, "a dense reward needs first_token_probs"
    matches = _first_token_rewards(predictions, task)
    pairs = zip(matches, predictions, first_token_probs, strict=True)
    return tuple(match or (float(prob) if prediction else 0.0) for match, prediction, prob in pairs)
