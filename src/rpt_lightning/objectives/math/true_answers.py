"""Check that true answers can be recognised.

Each must equal itself when it is written in other ways. Otherwise right answers count as wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from rpt_lightning.objectives.math.number_text import ANY_EXPONENT, digits
from rpt_lightning.objectives.math.verifier import MathVerifier
from rpt_lightning.types import Question

# Limit on the answers that are compared although nothing suggests a problem. Each takes some hundredths of a
# second.
MAX_PLAIN = 500
_NUM_NAMED = 5

# Math-Verify reads such answers in any form.
_SIMPLE = re.compile(r"-?(?:\d+(?:\.\d+)?|\d+/\d+|\\d?frac\{-?\d+\}\{\d+\})")
_THOUSANDS = re.compile(
    r"[+-]?\d{1,3}(?:(?P<mark>[,.' _\u00a0\u2009\u202f]|\\,|\\ |\{,\})\d{3})(?:(?P=mark)\d{3})*"
)
_MIXED = re.compile(r"(-?\d+) +(\d+)/(\d+)")
_ROOT = re.compile(r"√\s*(\d+|\w|\([^()]*\)|\{[^{}]*\})")
_LATEX = {
    **{"·": r"\cdot ", "⋅": r"\cdot ", "×": r"\times ", "÷": r"\div ", "−": "-", "–": "-", "±": r"\pm "},
    **{
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "∈": r"\in ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∅": r"\emptyset ",
    },
    **{"π": r"\pi ", "∞": r"\infty ", "°": r"^{\circ}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta "},
    **{mark: f"^{{{digit}}}" for digit, mark in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{mark: f"_{{{digit}}}" for digit, mark in enumerate("₀₁₂₃₄₅₆₇₈₉")},
}


def other_ways(answer: str) -> list[str]:
    r"""Return other ways in which a policy might write the same answer: in LaTeX, in digits.

    >>> [other_ways(text) for text in ("2√3", "1e-5", "12 500", "3 1/2", "x+1")]
    [['2\\sqrt{3}'], ['0.00001'], ['12500'], ['3\\frac{1}{2}'], []]
    """
    ways = [_in_latex(answer)]
    if ANY_EXPONENT.fullmatch(answer):
        ways.append(digits(answer))
    if (match := _THOUSANDS.fullmatch(answer)) and not (match["mark"] == "." and answer.count(".") == 1):
        ways.append(re.sub(r"[^\d+-]", "", answer))
    if match := _MIXED.fullmatch(answer):
        ways.append(rf"{match[1]}\frac{{{match[2]}}}{{{match[3]}}}")
    if answer in ("True", "False", "TRUE", "FALSE"):
        ways.append(answer.lower())
    return [way for way in ways if way != answer]


def _in_latex(answer: str) -> str:
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1].strip('(){}')}}}", answer)
    for character in set(text):
        if unicodedata.decomposition(character).startswith("<fraction>"):  # ½
            above, below = unicodedata.normalize("NFKC", character).split("⁄")
            text = text.replace(character, rf"\frac{{{above}}}{{{below}}}")
    return "".join(_LATEX.get(character, character) for character in text)


def unlike_themselves(answers: Iterable[str], verifier: MathVerifier) -> tuple[dict[str, str], int]:
    """Find true answers that Math-Verify does not consider equal to themselves.

    Returns each of them with the other way of writing it, and the number of answers that were not checked.
    All answers with known other ways of writing are checked. Of the others, plain numbers are skipped and the
    first ``MAX_PLAIN`` are checked.
    """
    ways = {answer: other_ways(answer) for answer in dict.fromkeys(answers) if not _SIMPLE.fullmatch(answer)}
    plain = [answer for answer, others in ways.items() if not others]
    pairs = [(answer, other) for answer, others in ways.items() for other in others] + [
        (answer, answer) for answer in plain[:MAX_PLAIN]
    ]
    unlike: dict[str, str] = {}
    for (answer, other), verdict in zip(pairs, verifier.verdicts(pairs), strict=True):
        if verdict != "right":
            unlike.setdefault(answer, other)
    return unlike, len(plain[MAX_PLAIN:])


def unlike_answer_remarks(questions: Sequence[Question], verifier: MathVerifier) -> list[str]:
    """Describe the questions whose true answer does not equal itself in another notation."""
    unlike, num_unasked = unlike_themselves((question.answer for question in questions), verifier)
    remarks = []
    if num_unasked:
        remarks.append(
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
        remarks.append(
            f"true answers: {len(named)} of {len(questions)} do not equal themselves according to "
            "Math-Verify, so right answers to them may count as wrong "
            f"({examples}{'; ...' if len(named) > _NUM_NAMED else ''}); write them in LaTeX or in digits, or "
            "leave them out"
        )
    return remarks
