"""The reward of a prediction, compared as bytes.

These are the prefix-matching reward and the three that the paper compares it with (RPT, sections 3.2 and 4).

Notation: ``y`` is the prediction, ``x_t x_{t+1} ...`` are the ground-truth tokens from the position on, and
``b(.)`` are their bytes. A missing or empty prediction earns 0 from every reward.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rpt_lightning.types import AnsweredTask, RolloutGroup, Task, TokenIds, TokenTask, TrainSequence

if TYPE_CHECKING:
    from rpt_lightning.objectives.base import BoundObjective
    from rpt_lightning.pretrained.token_bytes import TokenBytes


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

    needs_logprobs: bool = False
    """Whether ``scored_sequences`` asks the policy for log-probs."""

    @abstractmethod
    def group_rewards(self, answered: AnsweredTask) -> Sequence[float]:
        """Return one reward for each completion of a task, in order.

        ``answered`` holds the completions (tokens, length, form), their predictions, and the log-probs that
        ``scored_sequences`` asked for.
        """

    def scored_sequences(
        self, answered: AnsweredTask, bound: BoundObjective
    ) -> Sequence[TrainSequence | None]:
        """Return sequences whose target tokens the policy shall score.

        Their log-probs come as ``answered.logprobs``, with None for None. Only called if ``needs_logprobs``.
        """
        return ()

    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Return counts over the groups of a step that were rewarded, always under the same names."""
        return {}


class PrefixMatchReward(Reward):
    """``r_i = prefix_match(y_i, x_>=t)``, the reward of the main runs (RPT, equation 3)."""

    def group_rewards(self, answered: AnsweredTask) -> tuple[float, ...]:
        continuation = token_task(answered.task).continuation
        return tuple(
            0.0 if prediction is None else prefix_match(prediction, continuation)
            for prediction in answered.predictions
        )


class FirstTokenReward(Reward):
    """``r_i = 1[b(y_i) starts with b(x_t)]``. Only the first token must match (RPT's ablation)."""

    def group_rewards(self, answered: AnsweredTask) -> tuple[float, ...]:
        return _first_token_rewards(answered)


class DenseReward(Reward):
    """``r_i = 1`` if the first token matches, else ``P(y0_i | x_<t)`` (RPT's ablation).

    A likely guess earns a small reward. ``P(y0 | x_<t)`` is the policy's own probability of the prediction's
    first token when it is asked for the next token directly, without a thought. It is 0 if there is no
    prediction or if it is not text.
    """

    needs_logprobs = True

    def group_rewards(self, answered: AnsweredTask) -> tuple[float, ...]:
        return _dense_rewards(answered)

    def scored_sequences(
        self, answered: AnsweredTask, bound: BoundObjective
    ) -> Sequence[TrainSequence | None]:
        return _first_tokens(answered, bound)


class ConditionalDenseReward(Reward):
    """The dense reward if at least one first token of the group matches, else 0 (RPT's ablation)."""

    needs_logprobs = True

    def group_rewards(self, answered: AnsweredTask) -> tuple[float, ...]:
        if not any(_first_token_rewards(answered)):
            return (0.0,) * len(answered.predictions)
        return _dense_rewards(answered)

    def scored_sequences(
        self, answered: AnsweredTask, bound: BoundObjective
    ) -> Sequence[TrainSequence | None]:
        return _first_tokens(answered, bound)


def token_task(task: Task) -> TokenTask:
    """Return the task as a position of a text. Raises ValueError if it is not one."""
    if not isinstance(task, TokenTask):
        raise ValueError(
            f"task {task.task_id!r} is not a position of a text, as next-token reasoning needs; "
            "give --rollout.objective QuestionObjective, or another --data"
        )
    return task


def _first_token_rewards(answered: AnsweredTask) -> tuple[float, ...]:
    continuation = token_task(answered.task).continuation
    return tuple(
        0.0 if prediction is None else first_token_match(prediction, continuation)
        for prediction in answered.predictions
    )


def _dense_rewards(answered: AnsweredTask) -> tuple[float, ...]:
    matches = zip(_first_token_rewards(answered), answered.logprobs, strict=True)
    return tuple(match or (0.0 if logprobs is None else math.exp(logprobs[0])) for match, logprobs in matches)


def _first_tokens(answered: AnsweredTask, bound: BoundObjective) -> list[TrainSequence | None]:
    """Return for each prediction its first token after the plain context."""
    first = [_first_ids(bound.tokens, prediction) for prediction in answered.predictions]
    prompt_ids = bound.start_ids + answered.task.context_ids
    return [TrainSequence(prompt_ids=prompt_ids, target_ids=ids) if ids else None for ids in first]


def _first_ids(tokens: TokenBytes, prediction: bytes | None) -> TokenIds:
    try:
        return tokens.encode_plain((prediction or b"").decode())[:1]
    except ValueError:  # not UTF-8, or the tokenizer has no token for a character
        return ()
