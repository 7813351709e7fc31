"""`Objective`: the one interface between a problem that is put to the policy and everything else.

An objective says where in a text its tasks lie, what the policy sees there, how a completion is read, what it
earns, what counts as right on held-out text whatever the reward, and what the same weights do without a
thought. Data modules, rollouts, controls, validation and records ask a `BoundObjective` and know no leaf.

The other files of this folder are its leaves. docs/howto-objective.md shows how to write another one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from statistics import fmean
from typing import Any, ClassVar, Literal, final

from transformers import PreTrainedTokenizerBase

from rpt_lightning.objectives.box import answerable_lengths, extract_prediction, open_box_content
from rpt_lightning.objectives.prompts.template import BoundPrompt, ContinuationPrompt, PromptTemplate
from rpt_lightning.objectives.rewards.check import checked_rewards
from rpt_lightning.objectives.split_documents import SplitDocuments
from rpt_lightning.objectives.thought_budget import FLAG, NO_BUDGET, ThoughtBudget, length_reward
from rpt_lightning.pretrained.token_bytes import TokenBytes, start_ids
from rpt_lightning.types import (
    AnsweredTask,
    Completion,
    Outcome,
    RolloutGroup,
    Task,
    TokenIds,
    TrainSequence,
)


class Objective(ABC):
    """A problem that the policy is given. Only ``truth`` has no default.

    Args:
        prompt: How the policy is prompted. None adds nothing to the context (`ContinuationPrompt`).
    """

    prompt: PromptTemplate = ContinuationPrompt()

    records: ClassVar[Literal["positions", "questions"]] = "positions"
    """The form of a validation's records: positions of a text, or questions without one."""
    num_following_tokens: int = 0
    """Largest number of tokens from the position on that ``context_ids`` or ``truth`` reads."""
    num_truth_tokens: int = 0
    """Number of tokens of ``task.continuation`` that ``truth`` needs, if the text has that many.

    A task folder must have been prepared with an ``--answer_reach`` of at least as many.
    """
    num_added_tokens: int = 0
    """Largest number of tokens that ``context_ids`` has more than ``task.context_ids``."""
    tokens_after_thought: int | None = None
    """A completion ends this many tokens after its thought. None: the policy itself ends it."""
    needs_logprobs: bool = False
    """Whether ``scored_sequences`` asks the policy for log-probs."""
    has_material: bool = False
    """Whether ``material`` stores a text with each task."""
    has_follow_ups: bool = False
    """Whether training asks ``follow_ups`` for further tasks of the same step."""

    def __init__(self, prompt: PromptTemplate | None = None) -> None:
        if prompt is not None:
            self.prompt = prompt

    @final
    def bind(self, tokenizer: PreTrainedTokenizerBase, budget: ThoughtBudget = NO_BUDGET) -> BoundObjective:
        """Bind to a tokenizer. Raises ValueError if it cannot express the prompt."""
        bound = BoundObjective(self, tokenizer, budget)
        bound.prompt  # noqa: B018, raises
        return bound

    # Where tasks lie

    @property
    def places(self) -> str:
        """The name of the places that it asks about. A task folder must have been prepared for them."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def may_ask(self, tokens: Sequence[bytes], position: int) -> bool:
        """Whether a task may lie at ``position`` of a document. ``tokens`` are the bytes of all its tokens.

        `rpt prepare --objective` asks this for every position that is uncertain enough.
        """
        return True

    def is_answerable(self, tokens: Sequence[bytes], position: int, *, reach: int) -> bool:
        """Whether some right answer at ``position`` fits into a box.

        By default this is so if a box can hold some of the next ``reach`` tokens.
        """
        return bool(answerable_lengths(tokens[position : position + reach]))

    def material(self, documents: SplitDocuments, number: int, position: int) -> str | None:
        """Return a text to store with a task at ``position`` of document ``number``. It is ``task.material``.

        Whatever a task needs besides the text before the position can be stored here, such as sentences of
        other documents. None leaves the position out, and `rpt prepare` says how many there were. It is
        called after ``may_ask``, and only if ``has_material``.
        """
        return ""

    # What the policy sees

    def context_ids(self, task: Task, tokens: TokenBytes) -> TokenIds:
        """Return the tokens around which the prompt template is put."""
        return task.context_ids

    # How a completion is read

    def read(self, text: bytes, *, think_close: bytes | None) -> bytes | None:
        """Return the prediction in a finished completion, or None if it is not in the required form."""
        return extract_prediction(text, think_close=think_close)

    def answer_open_ids(self, bound: BoundObjective) -> TokenIds:
        """Return the tokens between a thought and an answer. By default they close it and open a box."""
        return bound.prompt.answer_open_ids

    def read_answer(self, text: bytes) -> bytes | None:
        """Return the prediction in a text that begins after ``answer_open_ids``."""
        return open_box_content(text)  # what follows the box does not matter

    # What counts as right

    @abstractmethod
    def truth(self, task: Task) -> tuple[bytes, ...]:
        """Return what the text really says, in pieces (the bytes of each token, or a single piece)."""

    def is_right(self, prediction: bytes, task: Task) -> bool:
        """Whether a prediction is right, whatever the reward. By default it must equal the truth."""
        return prediction == b"".join(self.truth(task))

    def outcomes(self, predictions: Sequence[bytes | None], task: Task) -> list[Outcome]:
        """Return one word for each prediction."""
        return [
            "unboxed" if not prediction else "right" if self.is_right(prediction, task) else "wrong"
            for prediction in predictions
        ]

    # What completions earn

    def rewards(self, answered: AnsweredTask) -> Sequence[float]:
        """Return one reward for each completion, in order. By default 1 if it is right, else 0."""
        return [
            float(prediction is not None and self.is_right(prediction, answered.task))
            for prediction in answered.predictions
        ]

    def scored_sequences(
        self, answered: AnsweredTask, bound: BoundObjective
    ) -> Sequence[TrainSequence | None]:
        """Return the sequences whose log-probs ``rewards`` needs. They come as ``answered.logprobs``."""
        return ()

    def num_trained(self, completion: Completion, bound: BoundObjective) -> int:
        """Return how many of a completion's tokens, from its first on, the reward trains. By default all."""
        return len(completion.token_ids)

    @property
    def rewarder(self) -> object:
        """The object whose class an error about a wrong reward names."""
        return self

    # Tasks that follow from others, in training only

    def training_task(self, task: Task) -> Task:
        """Return what training puts to the policy in place of a task of the data. By default the task itself.

        Held-out tasks are put as they are.
        """
        return task

    def follow_ups(self, answered: AnsweredTask, bound: BoundObjective) -> Sequence[Task]:
        """Return the tasks to which the completions of a task lead. By default none.

        They are rolled out with the same weights and trained in the same step. ``rewards`` then finds their
        groups, in this order, in ``answered.follow_ups``. They lead to no further tasks.
        """
        return ()

    # What the same weights do without a thought

    def direct_sequence(self, task: Task, bound: BoundObjective) -> TrainSequence:
        """Return prompt and true answer without a thought.

        The policy is right without a thought if each target token is the most likely one after those before
        it. By default the answer stands in a box that is already open.
        """
        truth = b"".join(self.truth(task)).decode(errors="replace")
        prompt_ids = bound.prompt_ids(task) + bound.answer_prefix_ids(())
        return TrainSequence(prompt_ids=prompt_ids, target_ids=bound.tokens.encode_plain(truth))

    # Checks and counts

    def remarks(self, tasks: Iterable[Task]) -> list[str]:
        """Return what a user should know about the tasks before a run begins."""
        return []

    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Return counts over the groups of a step that were rewarded, always under the same names."""
        return {}


@final
class BoundObjective:
    """An objective in the token ids of one tokenizer. The prompt is bound when it is first needed.

    With a budget of tokens, a task carries the budget of its batch (``posed``). Prompt and reward read it
    from there, so all that is computed from a task agrees, however late it is computed.

    Args:
        objective: The objective.
        tokenizer: Tokenizer of the policy.
        budget: The budget of tokens for a completion.
    """

    def __init__(
        self, objective: Objective, tokenizer: PreTrainedTokenizerBase, budget: ThoughtBudget = NO_BUDGET
    ) -> None:
        self.objective = objective
        self.budget = budget
        self._tokenizer = tokenizer
        self._stating_prompts: dict[int, BoundPrompt] = {}  # by budget

    # The budget of tokens

    def posed(self, tasks: Sequence[Task], *, step: int | None) -> tuple[Task, ...]:
        """Return the tasks as they are put to the policy.

        Args:
            tasks: The tasks. Those that have been posed before are posed anew.
            step: Optimizer steps before the one that trains the answers. None for held-out text, where the
                budget does not depend on the step.

        Raises:
            ValueError: Tasks of this kind cannot carry a budget.
        """
        if step is not None:
            tasks = [self.objective.training_task(task) for task in tasks]
        if not self.budget.is_set:
            return tuple(tasks)
        budget = self.budget.of_heldout if step is None else self.budget.at(step)
        return tuple(_with_budget(task, budget) for task in tasks)

    def check_budget(self, *, max_completion_tokens: int) -> None:
        """Raise ValueError if some budget leaves no room for an answer, or exceeds what may be generated."""
        if not self.budget.is_set:
            return
        values = self.budget.values
        if values[0] < self.num_form_tokens:
            raise ValueError(
                f"{FLAG}: the smallest budget is {values[0]} tokens, but the form of an answer alone takes "
                f"{self.num_form_tokens} (closing a thought, opening a box, one token, closing it); raise "
                f"{FLAG}.least to {self.num_form_tokens} or more ({FLAG}.heldout too, if it is smaller)"
            )
        if values[-1] > max_completion_tokens:
            raise ValueError(
                f"{FLAG}: the largest budget is {values[-1]} tokens, but completions are cut at "
                f"--rollout.sampling.max_completion_tokens {max_completion_tokens}; raise the limit, or "
                f"lower {FLAG}.initial (or heldout)"
            )

    @property
    def num_form_tokens(self) -> int:
        """Tokens of a completion with an empty thought and an answer of one token."""
        answer = self.objective.tokens_after_thought
        end = 1 + len(self.prompt.answer_close_ids) if answer is None else answer
        return len(self.objective.answer_open_ids(self)) + end

    def budget_metrics(
        self, groups: Sequence[RolloutGroup], *, step: int, pilot_size: int | None
    ) -> dict[str, float]:
        """Return what a step says about the budget. Empty without one.

        Means are over completions, with pilots over the first ``pilot_size`` of each group.
        """
        if not self.budget.is_set:
            return {}
        rows = [
            (len(completion.token_ids), prediction is not None, reward, task_budget(group.task))
            for group in groups
            for completion, prediction, reward in list(
                zip(group.completions, group.predictions, group.rewards, strict=True)
            )[:pilot_size]
        ]
        terms = [length_reward(length, budget) if answers else 0.0 for length, answers, _, budget in rows]
        weight = self.budget.weight
        means = {
            "reward/length_mean": terms,
            "reward/objective_mean": [
                (reward - weight * term) / (1 - weight)
                for (_, _, reward, _), term in zip(rows, terms, strict=True)
            ],
            "rollout/over_budget_frac": [float(length > budget) for length, _, _, budget in rows],
        }
        return {"rollout/thought_budget": float(self.budget.at(step))} | {
            name: fmean(values) if values else 0.0 for name, values in means.items()
        }

    # Prompts

    @cached_property
    def prompt(self) -> BoundPrompt:
        """The prompt without a budget. Its form of answer is that of every prompt of the objective."""
        return self.objective.prompt.bind(self._tokenizer)

    @cached_property
    def _with_note(self) -> Callable[[str], BoundPrompt]:
        return self.objective.prompt.bind_with_notes(self._tokenizer)

    def _stating(self, budget: int) -> BoundPrompt:
        if budget not in self._stating_prompts:
            self._stating_prompts[budget] = self._with_note(self.budget.note(budget))
        return self._stating_prompts[budget]

    def prompt_of(self, task: Task) -> BoundPrompt:
        """Return the prompt around a task's context, which may state the task's budget."""
        return self._stating(task_budget(task)) if self.budget.is_stated else self.prompt

    @cached_property
    def tokens(self) -> TokenBytes:
        return TokenBytes(self._tokenizer)

    @cached_property
    def start_ids(self) -> TokenIds:
        """The tokens before every text."""
        return start_ids(self._tokenizer)

    def prompt_ids(self, task: Task) -> TokenIds:
        """Return what the policy reads, with the thought already opened."""
        return self.prompt_of(task).prompt_ids(self.objective.context_ids(task, self.tokens))

    def answer_prefix_ids(self, thought_ids: TokenIds) -> TokenIds:
        """Return the tokens that force a thought when they follow the prompt. The answer comes next."""
        return tuple(thought_ids) + self.objective.answer_open_ids(self)

    @property
    def num_overhead_tokens(self) -> int:
        """Largest number of tokens that a prompt has more than its task's context."""
        prompts = map(self._stating, self.budget.values) if self.budget.is_stated else [self.prompt]
        return max(prompt.num_overhead_tokens for prompt in prompts) + self.objective.num_added_tokens

    def prediction(self, completion: Completion) -> bytes | None:
        """Return the prediction of a completion, or None if it does not answer in the required form.

        A truncated completion has not finished answering, so its prediction is None.
        """
        if completion.is_truncated:
            return None
        return self.objective.read(completion.text_bytes, think_close=self.prompt.think_close)

    def truth(self, task: Task) -> tuple[bytes, ...]:
        return self.objective.truth(task)

    def is_right(self, prediction: bytes | None, task: Task) -> bool:
        return prediction is not None and self.objective.is_right(prediction, task)

    def rewards(self, answered: AnsweredTask) -> tuple[float, ...]:
        """Return the rewards of a group. Raises ValueError unless they are one finite number each."""
        rewards = checked_rewards(
            self.objective.rewarder,
            self.objective.rewards(answered),
            num=len(answered.predictions),
            task_id=answered.task.task_id,
        )
        if not self.budget.is_set:
            return rewards
        lengths = [
            None if prediction is None else len(completion.token_ids)
            for completion, prediction in zip(answered.completions, answered.predictions, strict=True)
        ]
        return self.budget.mixed(rewards, lengths, task_budget(answered.task))

    def scored_sequences(self, answered: AnsweredTask) -> Sequence[TrainSequence | None]:
        return self.objective.scored_sequences(answered, self)

    def num_trained(self, completion: Completion) -> int:
        return self.objective.num_trained(completion, self)

    def follow_ups(self, answered: AnsweredTask) -> tuple[Task, ...]:
        """Return the tasks to which the completions of a task lead. They have its budget."""
        tasks = self.objective.follow_ups(answered, self)
        if not self.budget.is_set:
            return tuple(tasks)
        return tuple(_with_budget(task, task_budget(answered.task)) for task in tasks)

    def direct_sequence(self, task: Task) -> TrainSequence:
        return self.objective.direct_sequence(task, self)


def task_budget(task: Task) -> int:
    """Return the budget that a task carries. Only a task that was posed has one."""
    budget: int | None = getattr(task, "budget", None)
    assert budget is not None, f"task {task.task_id!r} was never posed, so its prompt is not determined"
    return budget


def _with_budget(task: Any, budget: int) -> Task:
    try:
        posed: Task = replace(task, budget=budget)
    except TypeError as error:
        raise ValueError(
            f"{FLAG}.initial is set, but {type(task).__name__} cannot carry a budget; give the dataclass a "
            "field `budget: int | None = None`, or leave the budget out"
        ) from error
    return posed
