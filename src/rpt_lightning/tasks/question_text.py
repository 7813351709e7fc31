r"""How a question is put: its text, its choices by letter, and the form of the answer. The rest is the prompt template's.

The wording is the one that the R1 distillations recommend for mathematics; for choices it asks for the letter.
"""

from __future__ import annotations

import string

from rpt_lightning.types import Question

LETTERS = string.ascii_uppercase

_ANSWER_FORM = r"Please reason step by step, and put your final answer within \boxed{}."
_CHOICE_FORM = r"Please reason step by step, and put the letter of the correct choice within \boxed{}."


def question_text(question: Question) -> str:
    r"""What the policy reads.

    >>> print(question_text(Question(question_id="q-1", text="What is 2 + 2?", answer="B", choices=("3", "4"))))
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
