"""A run's report on true answers at its start."""

from __future__ import annotations

from rpt_lightning.objectives.prompts.template import QuestionPrompt
from rpt_lightning.objectives.question import QuestionObjective
from rpt_lightning.objectives.rewards.answer import AnswerReward
from rpt_lightning.types import AnswerTask, Question


def test_questions_are_counted_and_named_once() -> None:
    said: list[str] = []
    answers = ["4", "2e-1", "B", "½"]
    tasks = tuple(
        AnswerTask(
            question=Question(
                question_id=f"q{number}", text="?", answer=answer, choices=("x", "y") if answer == "B" else ()
            ),
            context_ids=(1,),
        )
        for number, answer in enumerate(answers)
    )
    objective = QuestionObjective(QuestionPrompt(), AnswerReward(num_workers=1))
    for _ in range(2):  # as in an evaluation of two policies
        said += objective.remarks(tasks)
    assert said == [
        "true answers: 2 of 3 do not equal themselves according to Math-Verify, so right answers to them may "
        "count as wrong (question 'q1': '2e-1', written '0.2'; "
        r"question 'q3': '½', written '\\frac{1}{2}'); write them in LaTeX or in digits, or leave them out"
    ]
