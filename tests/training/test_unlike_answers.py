"""A run's report on true answers at its start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rpt_lightning.tasks.answer_reward import AnswerReward
from rpt_lightning.training import unlike_answers
from rpt_lightning.training.unlike_answers import say_unlike_answers
from rpt_lightning.types import AnswerTask, Question


def test_questions_are_counted_and_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(unlike_answers, "rank_zero_info", said.append)
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
    reward = AnswerReward(num_workers=1)
    for _ in range(2):  # as in an evaluation of two policies
        say_unlike_answers(SimpleNamespace(train=tasks[:2], heldout=tasks[2:]), reward)
    assert said == [
        "true answers: 2 of 3 do not equal themselves according to Math-Verify, so right answers to them may "
        "count as wrong (question 'q1': '2e-1', written '0.2'; "
        r"question 'q3': '½', written '\\frac{1}{2}'); write them in LaTeX or in digits, or leave them out"
    ]
