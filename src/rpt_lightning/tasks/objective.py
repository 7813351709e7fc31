"""One prompt and one reward: how the policy is prompted, and what earns reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rpt_lightning.tasks.answer import extract_prediction
from rpt_lightning.tasks.answer_reward import AnswerReward
from rpt_lightning.tasks.own_reward import check_reward, checked_rewards
from rpt_lightning.tasks.prompt import BoundPrompt, ChatPrompt, PromptTemplate, QuestionPrompt
from rpt_lightning.tasks.reward import Reward
from rpt_lightning.types import Completion, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundObjective:
    """An objective bound to the token ids of one tokenizer."""

    prompt: BoundPrompt
    reward: Reward

    def prediction(self, completion: Completion) -> bytes | None:
        """Return the prediction of a completion, or None if it does not answer in the required form.

        A truncated completion has not finished answering, so its prediction is None.
        """
        return None if completion.is_truncated else self.parse(completion.text_bytes)

    def parse(self, text: bytes) -> bytes | None:
        """Return the prediction of a finished answer."""
        return extract_prediction(text, think_close=self.prompt.think_close)

    def rewards(
        self,
        task: Task,
        predictions: Sequence[bytes | None],
        first_token_probs: Sequence[float] | None = None,
    ) -> tuple[float, ...]:
        """Return the rewards of the predictions of one task's group, in order."""
        returned = self.reward.group_rewards(predictions, task, first_token_probs)
        return checked_rewards(self.reward, returned, num=len(predictions), task_id=task.task_id)


class Objective:
    """A prompt template and a reward, as configured. ``bind`` ties them to a tokenizer.

    Args:
        prompt: How the policy is asked.
        reward: What its completions earn.
    """

    def __init__(self, prompt: PromptTemplate, reward: Reward) -> None:
        pays_answers = isinstance(reward, AnswerReward)
        if isinstance(prompt, ChatPrompt if pays_answers else QuestionPrompt):
            asks, fitting = (
                ("for the next token", "QuestionPrompt") if pays_answers else ("a question", "ChatPrompt")
            )
            raise ValueError(
                f"the objective's prompt {type(prompt).__name__} asks {asks}, and its reward "
                f"{type(reward).__name__} is for something else; "
                f"give --prompt {fitting} or ContinuationPrompt, or another reward"
            )
        check_reward(reward)
        self.prompt = prompt
        self.reward = reward

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> BoundObjective:
        """Bind to a tokenizer. Raises ValueError if it cannot express the prompt."""
        return BoundObjective(prompt=self.prompt.bind(tokenizer), reward=self.reward)
