"""Information gain: a thought earns what it adds to the probability of the true continuation.

RLP (arXiv:2510.01265): with ``c`` for the thought and ``x_t ...`` for the true tokens,

    r = log p(x_t ... | x_<t, c) - log p(x_t ... | x_<t)

No prediction is needed, so every token of a text gives a reward, and no verifier is asked. Only the tokens of
the thought are trained. RLP's advantage is ``G / (G - 1) (r_i - mean)`` (`model.advantage_scale` rloo).

It differs from RLP in one respect. RLP takes ``p(x_t | x_<t)`` from a moving average of the policy, and we
take it from the policy itself. Either is one number for all thoughts of a group, so it cancels in the
advantage.

NRT (arXiv:2602.11549) takes probabilities instead: with ``c_j`` for the probability of the j-th true token
after the thought and ``b_j`` without it,

    R = sum_j w_j c_j,   w_j proportional to -log b_j,   r = max(0, R - sum_j w_j b_j)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.box import extract_prediction, open_box_content
from rpt_lightning.objectives.next_token import AboutNextToken
from rpt_lightning.objectives.prompts.template import PromptTemplate
from rpt_lightning.objectives.rewards.next_token import token_task
from rpt_lightning.objectives.thought import thought_span
from rpt_lightning.types import AnsweredTask, Completion, Task, TokenIds, TrainSequence


def log_prob_gain(after_thought: Sequence[float], without: Sequence[float]) -> float:
    """Return RLP's reward from the log-probs (nats) of the true tokens.

    >>> round(log_prob_gain([math.log(0.5), math.log(0.4)], [math.log(0.25), math.log(0.1)]), 3)  # log 8
    2.079
    """
    return math.fsum(after_thought) - math.fsum(without)


def weighted_prob_gain(after_thought: Sequence[float], without: Sequence[float]) -> float:
    """Return NRT's reward from the log-probs (nats) of the true tokens. It is from 0 to 1.

    The weights are 2/3 and 1/3 here, so it is 2/3 (3/4 - 1/4) + 1/3 (1/2 - 1/2):

    >>> round(weighted_prob_gain([math.log(3 / 4), math.log(1 / 2)], [math.log(1 / 4), math.log(1 / 2)]), 3)
    0.333
    """
    surprise = -math.fsum(without)
    if surprise == 0.0:  # each token was certain
        return 0.0
    gain = math.fsum(
        -base / surprise * (math.exp(after) - math.exp(base))
        for after, base in zip(after_thought, without, strict=True)
    )
    return max(0.0, gain)


GAINS = {"log_prob": log_prob_gain, "weighted_prob": weighted_prob_gain}


class InformationGainObjective(AboutNextToken):
    """Think before the next token, rewarded by how much more probable the thought makes the true one.

    A completion is a thought, its closing marker, and one more token: the prediction on held-out text. It is
    right if it is the true next token, so accuracy with and without a thought compare as they do for
    next-token reasoning. Rewards do not look at it.

    A thought that is never closed earns the smallest gain of its group, and at most 0.

    Args:
        prompt: How the policy is prompted. Thoughts need a closing marker.
        num_tokens: Number of true tokens whose probability counts in the reward.
        gain: "log_prob" is RLP's reward, in nats. "weighted_prob" is NRT's, from 0 to 1.
        boxed: Put the truth into a box after the thought and read predictions from a box, as in next-token
            reasoning. Use this for policies that have learned to answer in a box.
    """

    needs_logprobs = True

    def __init__(
        self,
        prompt: PromptTemplate,
        num_tokens: int = 1,
        gain: Literal["log_prob", "weighted_prob"] = "log_prob",
        boxed: bool = False,
    ) -> None:
        super().__init__(prompt)
        if num_tokens < 1:
            raise ValueError(
                f"--rollout.objective.num_tokens {num_tokens}: give 1 (the next token) or more true tokens"
            )
        if getattr(prompt, "think_close", "") is None:
            raise ValueError(
                "InformationGainObjective needs to know where a thought ends, but "
                f"--rollout.objective.prompt {type(prompt).__name__} has think_close null; give both markers"
            )
        self.num_tokens = num_tokens
        self.gain = gain
        self.boxed = boxed
        self.num_following_tokens = num_tokens if num_tokens > 1 else 0
        self.tokens_after_thought = None if boxed else 1

    def read(self, text: bytes, *, think_close: bytes | None) -> bytes | None:
        if self.boxed:
            return extract_prediction(text, think_close=think_close)
        assert think_close is not None
        _, marker, prediction = text.rpartition(think_close)
        return prediction if marker else None

    def answer_open_ids(self, bound: BoundObjective) -> TokenIds:
        return bound.prompt.answer_open_ids if self.boxed else bound.prompt.close_ids

    def read_answer(self, text: bytes) -> bytes | None:
        return open_box_content(text) if self.boxed else text

    def rewards(self, answered: AnsweredTask) -> Sequence[float]:
        without, *after_thoughts = answered.logprobs
        assert without is not None
        gains = [None if after is None else GAINS[self.gain](after, without) for after in after_thoughts]
        least = min([0.0, *(gain for gain in gains if gain is not None)])
        return [least if gain is None else gain for gain in gains]

    def scored_sequences(
        self, answered: AnsweredTask, bound: BoundObjective
    ) -> Sequence[TrainSequence | None]:
        """Return the truth after the plain context, then after each thought (None if it is not closed)."""
        truth_ids = self.truth_ids(answered.task)
        without = TrainSequence(prompt_ids=bound.start_ids + answered.task.context_ids, target_ids=truth_ids)
        spans = [_span(completion, bound) for completion in answered.completions]
        return [
            without,
            *(
                None
                if span is None
                else TrainSequence(
                    prompt_ids=answered.prompt_ids + bound.answer_prefix_ids(completion.token_ids[: span[0]]),
                    target_ids=truth_ids,
                )
                for completion, span in zip(answered.completions, spans, strict=True)
            ),
        ]

    def num_trained(self, completion: Completion, bound: BoundObjective) -> int:
        span = _span(completion, bound)
        return len(completion.token_ids) if span is None else span[1]

    def truth_ids(self, task: Task) -> TokenIds:
        """Return the true tokens whose probability counts, fewer at the end of a document."""
        one = token_task(task)
        return (one.following_ids or one.continuation_ids)[: self.num_tokens]


def _span(completion: Completion, bound: BoundObjective) -> tuple[int, int] | None:
    """Return the numbers of tokens before and up to the end of the closing marker, or None."""
    assert bound.prompt.think_close is not None
    return thought_span(completion, bound.prompt.think_close, bound.tokens.drawn)
