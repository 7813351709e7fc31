r"""Next-segment reasoning: which sentence comes next, or stood in the middle? (RLPT, arXiv:2509.19249)

With the sentences ``s_1 s_2 ...`` of a text, RLPT has two tasks: autoregressive segment reasoning (ASR)
asks for ``s_i`` given ``s_<i``, and middle segment reasoning (MSR) asks for ``s_i`` given ``s_<i`` and
``s_i+1``. Its objective is ``J = J_ASR + lambda J_MSR``. Here a share of the tasks is MSR. It stands for
``lambda = share / (1 - share)``.

It differs from RLPT in these respects. The rewards that need no judge are our own (`rewards/segment.py`).
Sentences are split by rules (`sentences.py`) rather than with NLTK. Tasks are only at sentences that the
proxy finds uncertain enough. On held-out text a prediction is right if it is the very sentence, because a
judge's verdicts change with the judge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

from rpt_lightning.objectives.about_sentences import (
    MAX_TOKENS,
    MIN_WORDS,
    AboutSentences,
    longest_form,
    material_of,
)
from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.prompts.template import PromptTemplate
from rpt_lightning.objectives.rewards.segment import PrefixShareReward, SegmentReward
from rpt_lightning.objectives.split_documents import SplitDocuments
from rpt_lightning.objectives.thought import thought_span
from rpt_lightning.pretrained.token_bytes import TokenBytes
from rpt_lightning.types import AnsweredTask, Completion, RolloutGroup, Task, TokenIds, TrainSequence

GAP = " ____"
NUM_BEHIND = 3  # sentences after the segment that a judge may see

# What a chat model is told after the text. The words are our own.
ASK_NEXT = (
    "\n\n---\nThe text above breaks off. Think about how it goes on. Then write its next sentence, "
    r"and nothing else, in \boxed{}."
)
ASK_MIDDLE = (
    "\n\n---\nThe text above breaks off. After one sentence that is missing, it goes on with:",
    "\nThink about what stood between. Then write the missing sentence, and nothing else, in \\boxed{}.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The true segment of a task, as it is stored in the task folder.

    ``text`` is what stands in the document from the position on, with the space before the sentence if the
    position's token holds it. ``behind`` are up to three sentences that follow it directly, each in one line.
    ``shows_next`` says whether the first of them can be shown: it is short enough and not the segment again.

    >>> segment = Segment(text=" It rained.", behind=("We stayed in.",), shows_next=True)
    >>> Segment.from_text(segment.to_text()) == segment
    True
    """

    text: str
    behind: tuple[str, ...]
    shows_next: bool

    def to_text(self) -> str:
        return json.dumps({"text": self.text, "behind": self.behind, "shows_next": self.shows_next})

    @staticmethod
    @lru_cache(4096)
    def from_text(text: str) -> Segment:
        stored = json.loads(text)
        return Segment(text=stored["text"], behind=tuple(stored["behind"]), shows_next=stored["shows_next"])


class NextSegmentObjective(AboutSentences):
    """Predict the next sentence, or a missing one between its neighbours (RLPT, arXiv:2509.19249).

    A prediction is right if it is the true sentence in bytes, up to white space around it, whatever the
    reward. Without a thought, the policy writes the sentence into a box that is already open.

    Args:
        prompt: How the policy is prompted. QuestionPrompt asks in words, for chat models. None means
            ContinuationPrompt, which shows only the text (and a gap before the sentence that follows).
        reward: What completions earn. None means PrefixShareReward.
        middle_share: Fraction of the tasks that also show the sentence after the missing one. RLPT's lambda
            is middle_share / (1 - middle_share).
        max_tokens: Longest sentence in tokens. `rpt prepare` and the run must agree.
        min_words: Shortest sentence in words. `rpt prepare` and the run must agree.
        seed: Seed of the choice of the tasks that show the sentence after the missing one.
    """

    def __init__(
        self,
        prompt: PromptTemplate | None = None,
        reward: SegmentReward | None = None,
        middle_share: float = 0.5,
        max_tokens: int = MAX_TOKENS,
        min_words: int = MIN_WORDS,
        seed: int = 0,
    ) -> None:
        super().__init__(prompt, max_tokens=max_tokens, min_words=min_words)
        if not 0 <= middle_share <= 1:
            raise ValueError(f"--rollout.objective.middle_share {middle_share}: give a share from 0 to 1")
        self.reward = PrefixShareReward() if reward is None else reward
        if self.reward.trains_thoughts_alone and getattr(self.prompt, "think_close", "") is None:
            raise ValueError(
                f"{type(self.reward).__name__} needs to know where a thought ends, but "
                f"--rollout.objective.prompt {type(self.prompt).__name__} has think_close null; "
                "give both markers"
            )
        self.middle_share = middle_share
        self.seed = seed
        self.needs_logprobs = self.reward.needs_logprobs
        words = max(len(ASK_NEXT), len("".join(ASK_MIDDLE))) if self.is_chat else len(GAP)
        self.num_added_tokens = max_tokens + words

    @property
    def places(self) -> str:
        return f"next segment, {self.size}"

    def material(self, documents: SplitDocuments, number: int, position: int) -> str | None:
        found = self.sentences_of(documents, number)
        index = next((index for index, one in enumerate(found) if one.position == position), None)
        if index is None or not self.counts(found[index], documents.tokens):
            return None
        behind = list[str]()
        for one in found[index + 1 : index + 1 + NUM_BEHIND]:
            if not one.is_joined:
                break
            behind.append(one.in_line)
        shows_next = (
            bool(behind)
            and behind[0] != found[index].in_line  # a sentence said twice would show the answer
            and longest_form(behind[0], documents.tokens) <= self.max_tokens
        )
        return Segment(text=found[index].text, behind=tuple(behind), shows_next=shows_next).to_text()

    def context_ids(self, task: Task, tokens: TokenBytes) -> TokenIds:
        encode = tokens.encode_plain
        if self.asks_middle(task):
            behind = f" {segment_of(task).behind[0]}"
            if self.is_chat:
                before, after = ASK_MIDDLE
                return task.context_ids + encode(before) + encode(behind) + encode(after)
            return task.context_ids + encode(GAP) + encode(behind)
        return task.context_ids + (encode(ASK_NEXT) if self.is_chat else ())

    def asks_middle(self, task: Task) -> bool:
        """Whether the sentence after the missing one is shown (MSR). It depends on the seed and the task."""
        drawn = int.from_bytes(sha256(f"{self.seed}:{task.task_id}".encode()).digest()[:8]) / 2**64
        return drawn < self.middle_share and segment_of(task).shows_next

    def truth(self, task: Task) -> tuple[bytes, ...]:
        return (segment_of(task).text.strip().encode(),)

    def is_right(self, prediction: bytes, task: Task) -> bool:
        return prediction.strip() == self.truth(task)[0]

    def rewards(self, answered: AnsweredTask) -> Sequence[float]:
        segment = segment_of(answered.task)
        behind = () if self.asks_middle(answered.task) else segment.behind
        return self.reward.segment_rewards(answered, truth=segment.text, behind=behind)

    def scored_sequences(
        self, answered: AnsweredTask, bound: BoundObjective
    ) -> Sequence[TrainSequence | None]:
        return self.reward.scored_sequences(answered, bound, self._in_open_box(answered.task, bound))

    def num_trained(self, completion: Completion, bound: BoundObjective) -> int:
        if self.reward.trains_thoughts_alone:
            assert bound.prompt.think_close is not None
            span = thought_span(completion, bound.prompt.think_close, bound.tokens.drawn)
            if span is not None:
                return span[1]
        return len(completion.token_ids)

    def direct_sequence(self, task: Task, bound: BoundObjective) -> TrainSequence:
        """Return the prompt, an open box, the true sentence and the brace that closes the box.

        Without the brace, a text that begins with the sentence would count as right.
        """
        open_box = self._in_open_box(task, bound)
        closing_ids = bound.prompt.answer_close_ids[:-1]  # the last one ends the turn
        return TrainSequence(prompt_ids=open_box.prompt_ids, target_ids=open_box.target_ids + closing_ids)

    def _in_open_box(self, task: Task, bound: BoundObjective) -> TrainSequence:
        """Return the prompt with an open box after an empty thought, and the true sentence.

        The sentence begins as in the text, with a space if its first token has one. Chat models, which are
        asked for the sentence alone, get it without.
        """
        text = segment_of(task).text
        return TrainSequence(
            prompt_ids=bound.prompt_ids(task) + bound.answer_prefix_ids(()),
            target_ids=bound.tokens.encode_plain(text.strip() if self.is_chat else text),
        )

    @property
    def rewarder(self) -> object:
        return self.reward

    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        return self.reward.take_metrics(groups)


def segment_of(task: Task) -> Segment:
    """Return the task's segment. Raises ValueError if the task has none."""
    return Segment.from_text(material_of(task, "NextSegmentObjective"))
