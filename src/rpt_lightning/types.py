"""The records that pass between rooms.

Every record is frozen and keyword-only. It holds plain Python values (no tensors) and has a worked example.
Token ids are tuples, so that records can be compared, hashed and stored.

The example used throughout has the text ``"2 + 2 = 4."``, cut before ``" 4"``, and a tokenizer that splits it
into ``["2", " +", " 2", " =", " 4", "."]``:

>>> task = TokenTask(
...     task_id="doc-7:4", doc_id="doc-7", position=4, context_ids=(17, 340, 216, 446),
...     continuation_ids=(218, 30), continuation=(b" 4", b"."),
...     entropy=1.2, true_prob=0.31, true_rank=0, answerable=True,
... )
>>> completion = Completion(
...     token_ids=(9, 218, 7), text_bytes=b"hm</think>\\\\boxed{ 4}",
...     rollout_logprobs=(-0.5, -1.2, -0.1), policy_version=3, finish_reason="stop",
... )
>>> group = RolloutGroup(
...     task=task, prompt_ids=(17, 340, 216, 446, 2), completions=(completion, completion),
...     predictions=(b" 4", b" 4"), rewards=(1.0, 1.0),
... )
>>> group.is_live          # all rewards equal: every advantage is zero
False
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

TokenIds = tuple[int, ...]
FieldValue = str | int | float
Fields = Mapping[str, FieldValue]
FinishReason = Literal["stop", "length"]
Outcome = Literal["right", "wrong", "quoted", "unboxed", "truncated", "unreadable", "timeout", "error"]
"""The outcome of one completion.

``quoted``: it repeats an expression of the question that has the true value. ``unboxed``: it ended without an
answer in the required form. ``truncated``: it ran into the token limit. The last three say that the answer
could not be checked.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A stretch of a document's text that its source knows something about.

    The stretch is the characters ``start`` to ``end`` (exclusive).

    ``fields`` describe the stretch, for example its serial depth. ``thought`` is text that works it out from
    the text before it, if the source has one.

    >>> text = "One cup holds a ball: cup 3."
    >>> mark = Mark(start=25, end=27, fields={"depth": 0}, thought=" cup 3")
    >>> text[mark.start : mark.end]
    ' 3'
    """

    start: int
    end: int
    fields: Fields = field(default_factory=dict, hash=False)
    thought: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text of a corpus, with what its source knows about it.

    ``fields`` describe the whole text, and ``marks`` describe places in it. ``split`` is the side of the
    split on which it belongs, if its source knows that. A source knows it of all its documents or of none.

    >>> text = "Expression representing addition."
    >>> document = Document(doc_id="sympy.Add", text=text, fields={"module": "core"})
    >>> document.fields["module"], document.marks
    ('core', ())
    """

    doc_id: str
    text: str
    fields: Fields = field(default_factory=dict, hash=False)
    marks: tuple[Mark, ...] = ()
    split: Literal["train", "heldout"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTask:
    """One corpus position to predict: the context before it and the ground-truth continuation.

    ``task_id`` is ``f"{doc_id}:{position}"``. ``position`` is the 0-based index of the first token to
    predict, so ``len(context_ids) == position`` unless the context was truncated on the left to fit a prompt
    limit. ``continuation`` holds the bytes of each ground-truth token (``continuation_ids``), in order.
    ``entropy`` (nats), ``true_prob`` and ``true_rank`` (0 = most likely) are the proxy model's scores of the
    position. ``answerable`` says whether any prediction that ends on a token boundary within ``continuation``
    survives the box parser. ``fields`` are what the corpus knows about the position (``Document.fields``,
    overlaid by those of marks). ``following_ids`` are the document's tokens from the position on. They are
    empty unless the objective asks for them (``Objective.num_following_tokens``). ``rest_ids`` are all of the
    document's tokens from the position on. They are empty unless the run trains whole documents
    (``model.ntp_whole_documents``). ``budget`` is the number of tokens that the prompt allows for a
    completion. It is None until the task is put to the policy, and without a budget (`ThoughtBudget`).
    ``material`` is what the objective stored with the position when the folder was prepared
    (``Objective.material``).
    """

    task_id: str
    doc_id: str
    position: int
    context_ids: TokenIds
    continuation_ids: TokenIds
    continuation: tuple[bytes, ...]
    entropy: float
    true_prob: float
    true_rank: int
    answerable: bool
    fields: Fields = field(default_factory=dict, hash=False)
    following_ids: TokenIds = ()
    rest_ids: TokenIds = ()
    budget: int | None = None
    material: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question with an answer that can be checked.

    Math-Verify checks the answer. If there are ``choices``, the letter of the right one is checked instead.

    >>> question = Question(question_id="q-1", text="What is 2 + 2?", answer="B", choices=("3", "4"))
    >>> question.is_choice
    True
    """

    question_id: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    category: str | None = None

    @property
    def is_choice(self) -> bool:
        return bool(self.choices)


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerTask:
    """A question as the policy reads it.

    ``context_ids`` are the question's text, its choices and the form of the answer, in one model's tokens.
    ``budget`` is as in `TokenTask`.

    >>> question = Question(question_id="q-1", text="What is 2 + 2?", answer="4")
    >>> AnswerTask(question=question, context_ids=(17, 340)).task_id
    'q-1'
    """

    question: Question
    context_ids: TokenIds
    budget: int | None = None

    @property
    def task_id(self) -> str:
        return self.question.question_id

    # Prompts are ordered by document and position. Questions share no text.

    @property
    def doc_id(self) -> str:
        return self.question.question_id

    @property
    def position(self) -> int:
        return 0

    @property
    def entropy(self) -> None:
        """No proxy has scored a question."""

    @property
    def answerable(self) -> bool:
        return True

    @property
    def rest_ids(self) -> TokenIds:
        """Nothing follows a question."""
        return ()

    @property
    def fields(self) -> Fields:
        return {} if self.question.category is None else {"category": self.question.category}


class Task(Protocol):
    """One place at which the policy is asked something.

    Only an objective knows what kind of task it gets (`TokenTask` and `AnswerTask` are ours). Everything else
    reads these fields. ``entropy`` is the proxy's, in nats, or None if no proxy scored the place.
    ``answerable`` says whether some right answer fits into a box. ``rest_ids`` are the text from the position
    on, if the run trains whole documents.
    """

    @property
    def task_id(self) -> str: ...
    @property
    def doc_id(self) -> str: ...
    @property
    def position(self) -> int: ...
    @property
    def context_ids(self) -> TokenIds: ...
    @property
    def entropy(self) -> float | None: ...
    @property
    def answerable(self) -> bool: ...
    @property
    def rest_ids(self) -> TokenIds: ...
    @property
    def fields(self) -> Fields: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSettings:
    """How tokens are sampled.

    Every field is explicit, because each engine has its own defaults for unset fields.

    ``temperature`` 0 is greedy. ``top_p`` 1, ``top_k`` 0 and ``min_p`` 0 mean "no truncation" (pure
    temperature sampling). ``stop_after_first_box`` ends a completion with the token that completes the first
    box after ``think_close``, the marker that ends the thought. No token is added. If ``think_close`` is
    None, the thought has no marker, and the first box in the whole text counts. ``tokens_after_thought`` ends
    a completion that many tokens after the one that completes ``think_close``. Then boxes do not matter.

    >>> SamplingSettings(temperature=0.8, max_tokens=32, stop_token_ids=(2,)).is_truncating
    False
    """

    temperature: float
    max_tokens: int
    stop_token_ids: TokenIds
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_after_first_box: bool = False
    think_close: bytes | None = None
    tokens_after_thought: int | None = None

    @property
    def may_end_early(self) -> bool:
        """Whether a completion may end with a token that is no stop token."""
        return self.stop_after_first_box or self.tokens_after_thought is not None

    @property
    def is_truncating(self) -> bool:
        """Whether some tokens can never be sampled, which makes importance ratios biased."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """A request for ``n`` completions of one prompt. Completion ``i`` is sampled with seed ``seed + i``.

    >>> sampling = SamplingSettings(temperature=0.8, max_tokens=4, stop_token_ids=(2,))
    >>> GenerationRequest(task_id="doc-7:4", prompt_ids=(17, 340), n=8, seed=1, sampling=sampling).n
    8
    """

    task_id: str
    prompt_ids: TokenIds
    n: int
    seed: int
    sampling: SamplingSettings
    doc_id: str | None = None  # requests with the same document share a beginning; None: it shares nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """Sampled tokens of one request.

    ``token_ids`` includes the stop token if one was sampled (the policy is trained to stop). ``text_bytes``
    does not. ``rollout_logprobs`` are the engine's log-probs (nats) of ``token_ids`` under the distribution
    that was sampled from, that is, after the temperature (at temperature 1 for greedy decoding). All tokens
    are of ``policy_version``, because an engine takes new weights only between completions. ``finish_reason``
    "length" means truncated by ``max_tokens``. A completion that ended early (``may_end_early``) has "stop",
    and no stop token.
    """

    token_ids: TokenIds
    text_bytes: bytes
    rollout_logprobs: tuple[float, ...]
    policy_version: int
    finish_reason: FinishReason

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTokens:
    """Counts of prompt tokens, with each prompt counted once per completion.

    ``total`` counts all tokens. ``cached`` counts those that the engine took from its prefix cache.
    ``shareable`` counts those that it could have taken, in whole blocks, if it had kept every prompt since
    the last weight sync.

    >>> PromptTokens(total=800, cached=640, shareable=704) - PromptTokens(total=100, cached=0, shareable=0)
    PromptTokens(total=700, cached=640, shareable=704)
    >>> PromptTokens(total=8, cached=4, shareable=6) + PromptTokens(total=2, cached=1, shareable=1)
    PromptTokens(total=10, cached=5, shareable=7)
    """

    total: int
    cached: int
    shareable: int

    def __sub__(self, earlier: PromptTokens) -> PromptTokens:
        return PromptTokens(
            total=self.total - earlier.total,
            cached=self.cached - earlier.cached,
            shareable=self.shareable - earlier.shareable,
        )

    def __add__(self, other: PromptTokens) -> PromptTokens:
        return PromptTokens(
            total=self.total + other.total,
            cached=self.cached + other.cached,
            shareable=self.shareable + other.shareable,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AnsweredTask:
    """All completions of one task with their predictions: what a reward looks at.

    ``logprobs`` are the policy's log-probs (nats, temperature 1) of the target tokens of the sequences that
    the reward asked for (``Reward.scored_sequences``), in order. They are None for a sequence that was None.
    ``follow_ups`` are the groups of the tasks to which the completions led (``Objective.follow_ups``).
    """

    task: Task
    prompt_ids: TokenIds
    completions: tuple[Completion, ...]
    predictions: tuple[bytes | None, ...]
    logprobs: tuple[tuple[float, ...] | None, ...] = ()
    follow_ups: tuple[RolloutGroup, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutGroup:
    """All completions of one task, with their predictions and rewards.

    ``truth`` is what the text or the question really says, in pieces. ``masks_truncated`` says that truncated
    completions are not trained. They cannot make the group live. ``num_trained`` are the numbers of tokens of
    each completion that are trained, from its first on. If it is empty, all are. ``num_prefix_tokens`` is the
    number of tokens that the prompt template puts before the context. ``follow_ups`` are the groups of the
    tasks to which its completions led. They keep or lose their place in a step together with it.
    """

    task: Task
    prompt_ids: TokenIds
    completions: tuple[Completion, ...]
    predictions: tuple[bytes | None, ...]
    rewards: tuple[float, ...]
    truth: tuple[bytes, ...] = ()
    masks_truncated: bool = False
    num_trained: tuple[int, ...] = ()
    num_prefix_tokens: int = 0
    follow_ups: tuple[RolloutGroup, ...] = ()

    @property
    def family(self) -> tuple[RolloutGroup, ...]:
        """The group itself and its follow-ups, each without follow-ups of its own."""
        if not self.follow_ups:
            return (self,)
        return (replace(self, follow_ups=()), *self.follow_ups)

    @property
    def trained(self) -> list[tuple[Completion, float]]:
        """The completions that are trained and compared with each other, with their rewards.

        Each is cut after its last trained token.
        """
        completions = self.completions
        if self.num_trained:
            completions = tuple(
                replace(
                    completion,
                    token_ids=completion.token_ids[:num],
                    rollout_logprobs=completion.rollout_logprobs[:num],
                )
                for completion, num in zip(completions, self.num_trained, strict=True)
            )
        pairs = zip(completions, self.rewards, strict=True)
        return [
            (completion, reward)
            for completion, reward in pairs
            if not (self.masks_truncated and completion.is_truncated)
        ]

    @property
    def is_live(self) -> bool:
        """Whether the group has a gradient. Equal rewards give zero advantages."""
        rewards = [reward for _, reward in self.trained]
        return any(reward != rewards[0] for reward in rewards)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """The input of one call of `RPTModule.training_step`.

    It holds this rank's groups, and how their completions were sampled.
    """

    groups: tuple[RolloutGroup, ...]
    sampling: SamplingSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSequence:
    """Tokens for next-token training. The loss is on ``target_ids`` only, given ``prompt_ids``.

    ``temperature`` divides the logits of its targets, whatever the other sequences of a pass are scored at.
    None: the temperature of the pass.

    >>> TrainSequence(prompt_ids=(17, 340), target_ids=(216, 2)).num_tokens
    4
    """

    prompt_ids: TokenIds
    target_ids: TokenIds
    temperature: float | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)
