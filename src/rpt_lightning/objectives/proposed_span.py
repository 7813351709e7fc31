r"""Proposed spans: the policy names the span that it is then asked to find.

PretrainZero (arXiv:2512.03442): a proposer sees a paragraph and names a span. A solver sees the paragraph
with that span masked. Both are the policy. With ``p`` for the share of the solver's answers that are right,

    r_proposer = 1 - p   if p > 0, else 0
    r_solver   = 1[answer = span]

A proposal that is no span of the paragraph, or stands there twice, earns 0. So the proposer learns to name
what is hard to find, but can be found.

It differs from PretrainZero in the number of spans. PretrainZero takes 8 masks of each paragraph. Here a
group of proposals leads to as many solver tasks as it names different spans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rpt_lightning.objectives.base import BoundObjective, Objective
from rpt_lightning.objectives.masked_span import MaskedSpanObjective, SpanTask
from rpt_lightning.objectives.rewards.next_token import token_task
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import (
    AnsweredTask,
    Fields,
    RolloutGroup,
    Task,
    TokenIds,
    TokenTask,
    TrainSequence,
)

QUESTION = (
    "\n\nName a word of this text that a reader who does not see it could work out from the rest, but not at "
    "once. Answer with exactly this word in \\boxed{}."
)


def proposal_reward(share_right: float) -> float:
    """Return the proposer's reward, given the share of right answers to its proposal.

    >>> [proposal_reward(share) for share in (0.0, 0.25, 1.0)]
    [0.0, 0.75, 0.0]
    """
    return 1.0 - share_right if share_right > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Paragraph:
    """The text around a place of the data, of which the policy names a span."""

    place: TokenTask
    budget: int | None = None

    @property
    def task_id(self) -> str:
        return f"{self.place.task_id}:paragraph"

    @property
    def doc_id(self) -> str:
        return self.place.doc_id

    @property
    def position(self) -> int:
        return self.place.position

    @property
    def context_ids(self) -> TokenIds:
        return self.place.context_ids

    @property
    def shown_ids(self) -> TokenIds:
        return self.place.context_ids + self.place.following_ids

    @property
    def entropy(self) -> None:
        """No proxy has scored a paragraph."""

    @property
    def answerable(self) -> bool:
        return True

    @property
    def rest_ids(self) -> TokenIds:
        return self.place.rest_ids

    @property
    def fields(self) -> Fields:
        return self.place.fields


class ProposedSpanObjective(Objective):
    """Name a span of a text, and find the spans that were named.

    In training, each place of the data gives a paragraph: the text before the place, and ``max_tokens`` +
    ``num_behind`` tokens (of ``spans``) from it on. Each different valid span that the completions name
    becomes a task of its own in the same step, with the rest of the paragraph shown. Held-out tasks are
    masked spans at prepared places, as in `MaskedSpanObjective`.

    Args:
        spans: What a span is, how it is hidden and asked for, and the prompt of both questions.
        question: Text after the paragraph, which asks for a span.
    """

    has_follow_ups = True

    def __init__(self, spans: MaskedSpanObjective, question: str = QUESTION) -> None:
        super().__init__(spans.prompt)
        if not question.strip():
            raise ValueError(
                "--rollout.objective.question is empty: without a question a paragraph cannot be told from a "
                "text to continue; give some text"
            )
        self.spans = spans
        self.question = question
        self.num_truth_tokens = spans.num_truth_tokens
        self.num_following_tokens = spans.num_following_tokens
        # A paragraph is the longest: with its question, or with a mark and the other question.
        self.num_added_tokens = spans.num_following_tokens + max(
            len(question.encode()), len(f" {spans.mark}{spans.question}".encode())
        )

    @property
    def places(self) -> str:
        return self.spans.places

    def may_ask(self, tokens: Sequence[bytes], position: int) -> bool:
        return self.spans.may_ask(tokens, position)

    def context_ids(self, task: Task, tokens: TokenBytes) -> TokenIds:
        if isinstance(task, Paragraph):
            return task.shown_ids + tokens.encode_plain(self.question)
        return self.spans.context_ids(task, tokens)

    def truth(self, task: Task) -> tuple[bytes, ...]:
        """Return the hidden text. A paragraph has none, since many spans may be named."""
        return () if isinstance(task, Paragraph) else self.spans.truth(task)

    def direct_sequence(self, task: Task, bound: BoundObjective) -> TrainSequence:
        return self.spans.direct_sequence(task, bound)

    def training_task(self, task: Task) -> Task:
        return Paragraph(place=token_task(task))

    def follow_ups(self, answered: AnsweredTask, bound: BoundObjective) -> Sequence[Task]:
        """Return a task for each different span that the completions name."""
        paragraph = answered.task
        assert isinstance(paragraph, Paragraph)
        shown = [bound.tokens[token] for token in paragraph.shown_ids]
        spans = self.spans.spans(shown)
        named = dict.fromkeys(text for text in answered.predictions if text is not None)
        return [
            _span_task(paragraph, shown, *spans[text][0]) for text in named if len(spans.get(text, ())) == 1
        ]

    def rewards(self, answered: AnsweredTask) -> Sequence[float]:
        if not isinstance(answered.task, Paragraph):
            return super().rewards(answered)
        shares = {b"".join(group.truth): self._share_right(group) for group in answered.follow_ups}
        return [
            0.0 if prediction is None else proposal_reward(shares.get(prediction, 0.0))
            for prediction in answered.predictions
        ]

    def _share_right(self, group: RolloutGroup) -> float:
        """Return the share of right answers. A completion without an answer is not right."""
        return fmean(
            prediction is not None and self.is_right(prediction, group.task)
            for prediction in group.predictions
        )

    def remarks(self, tasks: Iterable[Task]) -> list[str]:
        return [
            "proposals: each context of a step also leads to one group for each different span that its "
            "completions name; the numbers of completions and tokens that follow do not include them"
        ]

    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        proposals = [group for group in groups if isinstance(group.task, Paragraph)]
        spans = [group for group in groups if not isinstance(group.task, Paragraph)]
        shares = [self._share_right(group) for group in spans]
        return {
            "proposal/written": float(sum(len(group.completions) for group in proposals)),
            "proposal/rewarded": float(sum(reward > 0 for group in proposals for reward in group.rewards)),
            "proposal/spans": float(len(spans)),
            "proposal/never_found": float(sum(share == 0 for share in shares)),
            "proposal/always_found": float(sum(share == 1 for share in shares)),
        }


def _span_task(paragraph: Paragraph, shown: Sequence[bytes], first: int, num_tokens: int) -> SpanTask:
    """Return the task to find the span of ``num_tokens`` tokens from token ``first`` of a paragraph on."""
    place = paragraph.place
    position = place.position - len(place.context_ids) + first
    return SpanTask(
        task_id=f"{place.task_id}:span-{position}-{num_tokens}",
        doc_id=place.doc_id,
        position=position,
        context_ids=paragraph.shown_ids[:first],
        span=tuple(shown[first : first + num_tokens]),
        behind_ids=paragraph.shown_ids[first + num_tokens :],
        fields=place.fields,
        rest_ids=(place.context_ids + place.rest_ids)[first:] if place.rest_ids else (),
    )
