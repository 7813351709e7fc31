r"""What a predicted segment earns: bytes, log-probs, or the verdict of a judge.

Notation: ``s`` is the true segment and ``y`` the prediction, both without white space around them. ``b(.)``
are their bytes, and ``c`` is the thought. A missing or empty prediction earns 0.

RLPT (arXiv:2509.19249) uses a judge. The two other rewards are our own. They need none.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rpt_lightning.objectives.judges.segment_judge import JudgeQuestion, SegmentJudge, verdict
from rpt_lightning.objectives.thought import thought_span
from rpt_lightning.types import AnsweredTask, RolloutGroup, TrainSequence

if TYPE_CHECKING:
    from rpt_lightning.objectives.base import BoundObjective


def prefix_share(prediction: bytes, truth: bytes) -> float:
    """Return how much of the longer of the two their common beginning is, from 0 to 1, in bytes.

    As long as the prediction is no longer than the truth, this is the right prefix as a share of the truth.
    It is 1 only for the truth itself: what goes beyond it counts as wrong. White space around them does not
    count.

    >>> truth = b" The cat sat."  # 12 bytes without the space
    >>> [round(prefix_share(text, truth), 3) for text in (b"The cat ran.", b"The cat sat.", b"A cat sat.")]
    [0.667, 1.0, 0.0]
    >>> prefix_share(b"The cat sat. It slept...", truth)  # 12 of 24
    0.5
    """
    prediction, truth = prediction.strip(), truth.strip()
    pairs = enumerate(zip(prediction, truth, strict=False))
    differing = (number for number, (ours, true) in pairs if ours != true)
    common = next(differing, min(len(prediction), len(truth)))
    return common / max(len(prediction), len(truth), 1)


def mean_gain(after_thought: Sequence[float], without: Sequence[float]) -> float:
    """Return the mean gain in log-prob of the segment's tokens, in nats per token.

    >>> round(mean_gain([math.log(0.5), math.log(0.4)], [math.log(0.25), math.log(0.1)]), 3)  # log(8) / 2
    1.04
    """
    return (math.fsum(after_thought) - math.fsum(without)) / len(without)


class SegmentReward(ABC):
    """The rewards of predicted segments."""

    needs_logprobs: bool = False
    """Whether ``scored_sequences`` asks the policy for log-probs."""
    trains_thoughts_alone: bool = False
    """Whether only thoughts are trained, since the reward does not look at what comes after them."""

    @abstractmethod
    def segment_rewards(
        self, answered: AnsweredTask, *, truth: str, behind: Sequence[str]
    ) -> Sequence[float]:
        """Return one reward for each completion, in order.

        ``behind`` are the sentences that follow the true segment directly, as far as the policy did not see
        them. ``answered`` also holds the log-probs that ``scored_sequences`` asked for.
        """

    def scored_sequences(
        self, answered: AnsweredTask, bound: BoundObjective, without: TrainSequence
    ) -> Sequence[TrainSequence | None]:
        """Return sequences whose target tokens the policy shall score. Only called if ``needs_logprobs``.

        ``without`` is the true segment in a box after an empty thought.
        """
        return ()

    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Return counts over the groups of a step that were rewarded, always under the same names."""
        return {}


class PrefixShareReward(SegmentReward):
    """``r_i = |common prefix of b(y_i) and b(s)| / max(|b(y_i)|, |b(s)|)``, from 0 to 1 (`prefix_share`)."""

    def segment_rewards(
        self, answered: AnsweredTask, *, truth: str, behind: Sequence[str]
    ) -> tuple[float, ...]:
        return tuple(prefix_share(prediction or b"", truth.encode()) for prediction in answered.predictions)


class LogProbGainReward(SegmentReward):
    """``r_i = (log p(s | x, c_i) - log p(s | x)) / |s|`` in nats per token, where ``x`` is the prompt.

    The segment stands in a box after the thought. Without a thought it stands in a box after an empty one, so
    an empty thought earns 0. As for information gain (RLP, arXiv:2510.01265), only thoughts are trained,
    and a thought that is never closed earns the least of its group, and at most 0. No prediction is needed.
    """

    needs_logprobs = True
    trains_thoughts_alone = True

    def segment_rewards(
        self, answered: AnsweredTask, *, truth: str, behind: Sequence[str]
    ) -> tuple[float, ...]:
        without, *after_thoughts = answered.logprobs
        assert without is not None
        gains = [None if after is None else mean_gain(after, without) for after in after_thoughts]
        least = min([0.0, *(gain for gain in gains if gain is not None)])
        return tuple(least if gain is None else gain for gain in gains)

    def scored_sequences(
        self, answered: AnsweredTask, bound: BoundObjective, without: TrainSequence
    ) -> Sequence[TrainSequence | None]:
        """Return the truth after no thought, then after each thought (None if it is not closed)."""
        assert bound.prompt.think_close is not None
        sequences: list[TrainSequence | None] = [without]
        for completion in answered.completions:
            span = thought_span(completion, bound.prompt.think_close, bound.tokens.drawn)
            prefix = None if span is None else bound.answer_prefix_ids(completion.token_ids[: span[0]])
            sequences.append(
                None
                if prefix is None
                else TrainSequence(prompt_ids=answered.prompt_ids + prefix, target_ids=without.target_ids)
            )
        return sequences


class JudgeReward(SegmentReward):
    """``r_i = 1`` if a judge says that ``y_i`` means a beginning of the true continuation, else 0 (RLPT).

    The true continuation is the segment and up to three sentences after it, since comparing with the segment
    alone was too strict for RLPT. If the policy saw the sentence after the segment, it is the segment alone.
    The judge is not asked about a prediction that is missing, empty, or equal to the segment.

    If a reply has no verdict, the judge is asked once more. If that reply has none either, the run stops with
    an error. ``judge/asked`` and ``judge/unreadable`` count predictions and such replies.

    Args:
        judge: Who judges: LocalJudge or ServerJudge.
    """

    def __init__(self, judge: SegmentJudge) -> None:
        self.judge = judge
        self._asked = self._unreadable = 0
        self._lock = threading.Lock()  # rollouts may be rewarded in one thread and logged in another

    def segment_rewards(
        self, answered: AnsweredTask, *, truth: str, behind: Sequence[str]
    ) -> tuple[float, ...]:
        texts = [(one or b"").decode(errors="replace").strip() for one in answered.predictions]
        known = {"": False, truth.strip(): True}
        new = [text for text in dict.fromkeys(texts) if text not in known]
        reference = " ".join([truth.strip(), *behind])
        asked = [JudgeQuestion(prediction=text, reference=reference) for text in new]
        known |= zip(new, self._verdicts(asked, answered.task.task_id), strict=True)
        return tuple(float(known[text]) for text in texts)

    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Return the counts since the last call."""
        with self._lock:
            counts = {"judge/asked": float(self._asked), "judge/unreadable": float(self._unreadable)}
            self._asked = self._unreadable = 0
        return counts

    def _verdicts(self, questions: Sequence[JudgeQuestion], task_id: str) -> list[bool]:
        """Ask, and ask again where a reply has no verdict. Raises ValueError if that has none either."""
        found: dict[JudgeQuestion, bool | None] = dict.fromkeys(questions)
        replies: list[str] = []
        for attempt in range(2):
            missing = [question for question in questions if found[question] is None]
            if not missing:
                break
            replies = self.judge.replies([question.prompt for question in missing], attempt=attempt)
            found |= zip(missing, map(verdict, replies), strict=True)
            unreadable = sum(found[question] is None for question in missing)
            with self._lock:
                self._asked += len(missing) if attempt == 0 else 0
                self._unreadable += unreadable
        verdicts = [found[question] for question in questions]
        if None in verdicts:
            reply = next(reply for reply in replies if verdict(reply) is None)
            raise ValueError(
                f"--rollout.objective.reward.judge {self.judge.name}: twice no verdict about a prediction "
                f"for task {task_id!r}. A reply must end with 'Score: 1' or 'Score: 0', and the last one "
                f"ends with {reply.strip()[-80:]!r}; give a model that follows instructions, "
                "or raise max_reply_tokens"
            )
        return [bool(one) for one in verdicts]
