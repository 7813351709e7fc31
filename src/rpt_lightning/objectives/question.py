"""Questions with a verifiable answer: reinforcement fine-tuning after RPT (section 4.4), and benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rpt_lightning.objectives.base import Objective
from rpt_lightning.objectives.prompts.template import ChatPrompt, PromptTemplate
from rpt_lightning.objectives.rewards.answer import AnswerReward, answer_task
from rpt_lightning.types import AnsweredTask, Outcome, RolloutGroup, Task

PLACES = "questions"


class QuestionObjective(Objective):
    """Answer a question.

    An answer is right if Math-Verify says so, or if it is the letter of the right choice. Without a thought,
    the policy writes its answer into a box that is already open.

    Args:
        prompt: How the policy is prompted.
        reward: Checks the answers.
    """

    records = "questions"

    def __init__(self, prompt: PromptTemplate, reward: AnswerReward) -> None:
        if isinstance(prompt, ChatPrompt):
            raise ValueError(
                "QuestionObjective cannot use ChatPrompt, which asks for the next token; "
                "give the prompt QuestionPrompt or ContinuationPrompt"
            )
        super().__init__(prompt)
        self.reward = reward

    @property
    def places(self) -> str:
        return PLACES

    def truth(self, task: Task) -> tuple[bytes, ...]:
        return (answer_task(task).question.answer.encode(),)

    def is_right(self, prediction: bytes, task: Task) -> bool:
        return self.outcomes([prediction], task) == ["right"]

    def outcomes(self, predictions: Sequence[bytes | None], task: Task) -> list[Outcome]:
        return list(self.reward.verdicts(answer_task(task), predictions))

    def rewards(self, answered: AnsweredTask) -> Sequence[float]:
        return self.reward.group_rewards(answered)

    @property
    def rewarder(self) -> object:
        return self.reward

    def remarks(self, tasks: Iterable[Task]) -> list[str]:
        return self.reward.unlike_answers([answer_task(task).question for task in tasks])

    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        return self.reward.take_metrics(groups)
