"""Reports at the start which true answers cannot be checked, before a run is rewarded by them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from rpt_lightning.tasks.answer_reward import AnswerReward
from rpt_lightning.tasks.reward import Reward
from rpt_lightning.tasks.true_answers import unlike_themselves
from rpt_lightning.types import AnswerTask

_NUM_NAMED = 5


@rank_zero_only
def say_unlike_answers(data: Any, reward: Reward) -> None:
    """Count and name the questions whose true answer does not equal itself in another notation.

    The run continues.
    """
    if not isinstance(reward, AnswerReward):
        return
    tasks = [
        task
        for part in ("train", "heldout")
        for task in getattr(data, part, ())
        if isinstance(task, AnswerTask)
    ]
    questions = [
        task.question
        for task in tasks
        if not task.question.is_choice and task.question.answer not in reward.checked_answers
    ]
    unlike, num_unasked = unlike_themselves((question.answer for question in questions), reward.verifier)
    reward.checked_answers |= {question.answer for question in questions}
    if num_unasked:
        rank_zero_info(
            f"true answers: {num_unasked} of them, which are not plain numbers, "
            "were not compared with themselves"
        )
    named = [question for question in questions if question.answer in unlike]
    if named:
        examples = "; ".join(
            f"question {question.question_id!r}: {question.answer!r}"
            + ("" if (other := unlike[question.answer]) == question.answer else f", written {other!r}")
            for question in named[:_NUM_NAMED]
        )
        rank_zero_info(
            f"true answers: {len(named)} of {len(questions)} do not equal themselves according to "
            "Math-Verify, so right answers to them may count as wrong "
            f"({examples}{'; ...' if len(named) > _NUM_NAMED else ''}); write them in LaTeX or in digits, or "
            "leave them out"
        )
