r"""The text of a question: the question itself, its choices by letter, and the form of the answer.

The prompt template adds the rest. The wording is the one that the R1 distillations recommend for mathematics.
With choices it asks for the letter.
"""

from __future__ import annotations

import string

from rpt_lightning.types import Question

LETTERS = string.ascii_uppercase

_ANSWER_FORM = r"Please reason step by step, and put your final answer within \boxed{}."
_CHOICE_FORM = r"Please reason step by step, and put the letter of the correct choice within \boxed{}."


def question_text(question: Question) -> str:
    r"""Return the text that the policy reads.

    >>> question = Question(question_id="q-1", text="What is 2 + 2?", answer="B", choices=("3", "4"))
    >>> print(question_text(question))
    What is 2 + 2?
    <BLANKLINE>
    A. 3
    B. 4
    <BLANKLINE>
    Please reason step by step, and put the letter of the correct choice within \boxed{}.
    <BLANKLINE>
    """
    choices = "\n".join(
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)
    )
    parts = [question.text, choices, _CHOICE_FORM] if question.is_choice else [question.text, _ANSWER_FORM]
    return "\n\n".join(parts) + "\n"
