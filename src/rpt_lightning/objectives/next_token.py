"""Next-token reasoning, the objective of RPT (arXiv:2506.08007, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.objectives.base import BoundObjective, Objective
from rpt_lightning.objectives.prompts.template import PromptTemplate, QuestionPrompt
from rpt_lightning.objectives.rewards.check import check_reward
from rpt_lightning.objectives.rewards.next_token import Reward, prefix_match, token_task
from rpt_lightning.types import AnsweredTask, RolloutGroup, Task, TrainSequence

PLACES = "next token"


class AboutNextToken(Objective):
    """What all objectives about the next token have in common.

    A prediction is right if it is the true continuation up to a token boundary (RPT, equation 3). Without a
    thought, the policy predicts the next token of the plain context.
    """

    def __init__(self, prompt: PromptTemplate) -> None:
        if isinstance(prompt, QuestionPrompt):
            raise ValueError(
                f"{type(self).__name__} cannot use QuestionPrompt, which does not ask for the next token; "
                "give the prompt ChatPrompt or ContinuationPrompt"
            )
        super().__init__(prompt)

    @property
    def places(self) -> str:
        return PLACES

    def truth(self, task: Task) -> tuple[bytes, ...]:
        return token_task(task).continuation

    def is_right(self, prediction: bytes, task: Task) -> bool:
        return prefix_match(prediction, token_task(task).continuation) == 1.0

    def direct_sequence(self, task: Task, bound: BoundObjective) -> TrainSequence:
        return TrainSequence(
            prompt_ids=bound.start_ids + task.context_ids, target_ids=token_task(task).continuation_ids[:1]
        )


class NextTokenObjective(AboutNextToken):
    """Predict how the text continues at an uncertain position.

    A prediction is right if it is the true continuation up to a token boundary (equation 3), whatever the
    reward. Without a thought, the policy predicts the next token of the plain context.

    Args:
        prompt: How the policy is prompted.
        reward: What its completions earn.
    """

    def __init__(self, prompt: PromptTemplate, reward: Reward) -> None:
        super().__init__(prompt)
        check_reward(reward)
        self.reward = reward
        self.needs_logprobs = reward.needs_logprobs

    def rewards(self, answered: AnsweredTask) -> Sequence[float]:
        return self.reward.group_rewards(answered)

    def scored_sequences(
        self, answered: AnsweredTask, bound: BoundObjective
    ) -> Sequence[TrainSequence | None]:
        return self.reward.scored_sequences(answered, bound)

    @property
    def rewarder(self) -> object:
        return self.reward

    def take_metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        return self.reward.take_metrics(groups)
