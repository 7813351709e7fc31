"""What a prediction is paid, in bytes (RPT, sections 3.2 and 4: the prefix-matching reward and the three that the paper compares it with).

Notation: ``y`` is the prediction, ``x_t x_{t+1} ...`` the ground-truth tokens from the position on, ``b(.)`` their bytes. A missing prediction is
paid 0 by every reward, and so is an empty one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from rpt_lightning.types import Task, TokenTask


def prefix_match(prediction: bytes, continuation: Sequence[bytes]) -> float:
    """RPT, equation 3: 1 iff ``b(y)`` is a prefix of ``b(x_t x_{t+1} ...)`` that ends on a token boundary, else 0.

    ``continuation`` holds the bytes of each ground-truth token in order. An empty prediction is wrong, and so is one that reaches beyond
    ``continuation``.

    >>> [prefix_match(prediction, [b" the", b" sum"]) for prediction in (b" the", b" the sum", b" the s", b"the")]
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
    """1 iff ``b(y)`` starts with ``b(x_t)``, else 0.

    Bytes do not show how ``y`` would be cut into tokens: with the truth " the", the prediction " theory" matches too, although its own first token
    may be " theory". Only a prediction that ends inside the first token, or differs from it, is refused.

    >>> [first_token_match(prediction, [b" the", b" sum"]) for prediction in (b" the", b" the product", b" th")]
    [1.0, 1.0, 0.0]
    """
    return float(bool(continuation) and len(continuation[0]) > 0 and prediction.startswith(continuation[0]))


class Reward(ABC):
    """What the completions of one task are paid, all of them together since a reward may look at the whole group."""

    needs_first_token_probs: bool
    """Whether ``group_rewards`` must be given the policy's own probability of each prediction's first token."""

    @abstractmethod
    def group_rewards(
        self,
        predictions: Sequence[bytes | None],
        task: Task,
        first_token_probs: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        """One reward a prediction, in order.

        ``first_token_probs[i]`` is ``P(y0 | x_<t)``: the probability, under the policy asked for the next token directly and without a thought, of
        the first token of prediction ``i``; it is not read where the prediction is missing or empty. None unless ``needs_first_token_probs``.
        """


class PrefixMatchReward(Reward):
    """``r_i = prefix_match(y_i, x_>=t)``: the reward of the main runs (RPT, equation 3)."""

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
    """``r_i = 1[b(y_i) starts with b(x_t)]``: only the first token must match (RPT's ablation)."""

    needs_first_token_probs = False

    def group_rewards(
        self,
        predictions: Sequence[bytes | None],
        task: Task,
        first_token_probs: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        return _first_token_rewards(predictions, task)


class DenseReward(Reward):
    """``r_i = 1`` where the first token matches, else ``P(y0_i | x_<t)`` (RPT's ablation): a likely guess is paid a little."""

    needs_first_token_probs = True

    def group_rewards(
        self,
        predictions: Sequence[bytes | None],
        task: Task,
        first_token_probs: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        return _dense_rewards(predictions, task, first_token_probs)


class ConditionalDenseReward(Reward):
    """The dense reward in groups with at least one matching first token; every other group is paid 0 (RPT's ablation)."""

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
            f"task {task.task_id!r} is a question, and this reward pays for next-token predictions; give --rollout.objective.reward AnswerReward"
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
