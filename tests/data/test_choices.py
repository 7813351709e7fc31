"""Choices and answer keys in the forms that datasets use, with made-up content."""

from __future__ import annotations

from typing import Any

import pytest

from rpt_lightning.data.sources.questions import QuestionFields, read_question

ARC = QuestionFields(question="question", choices="choices", answer="answerKey")
PLAIN = QuestionFields(question="q", choices="c", answer="a")
FROM_0 = QuestionFields(question="q", choices="c", answer="a", answer_is="index_from_0")
FROM_1 = QuestionFields(question="q", choices="c", answer="a", answer_is="index_from_1")
TEXT = QuestionFields(question="q", choices="c", answer="a", answer_is="text")
COLUMNS = QuestionFields(question="q", choices=["A", "B", "C", "D"], answer="a")
LABELS = QuestionFields(question="q", choices="c", labels="names", answer="a")


@pytest.mark.parametrize(
    ("fields", "row", "letter", "choices"),
    [
        # ARC: most rows have letters and some have digits. The answer is always one of the row's own labels.
        (
            ARC,
            {"question": "?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
            "B",
            ("x", "y"),
        ),
        (
            ARC,
            {
                "question": "?",
                "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]},
                "answerKey": "2",
            },
            "B",
            ("x", "y", "z"),
        ),
        (
            ARC,
            {
                "question": "?",
                "choices": [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}],
                "answerKey": "a",
            },
            "A",
            ("x", "y"),
        ),
        # MMLU: an index from 0, given as a number or as a ClassLabel.
        (FROM_0, {"q": "?", "c": ["x", "y", "z"], "a": 0}, "A", ("x", "y", "z")),
        (FROM_0, {"q": "?", "c": ["x", "y", "z"], "a": "2"}, "C", ("x", "y", "z")),
        (FROM_1, {"q": "?", "c": ["x", "y", "z"], "a": 1}, "A", ("x", "y", "z")),
        # Letters in the forms that people write.
        *(
            (PLAIN, {"q": "?", "c": ["x", "y", "z"], "a": key}, "C", ("x", "y", "z"))
            for key in ("C", "c", "(C)", " c) ", "C.", ["C"], "(C) z")
        ),
        # Objects by label, in any order. In a table, rows with fewer choices end with nulls.
        (PLAIN, {"q": "?", "c": {"A": "x", "B": "y"}, "a": "b"}, "B", ("x", "y")),
        (PLAIN, {"q": "?", "c": {"B": "y", "A": "x"}, "a": "A"}, "B", ("y", "x")),
        (PLAIN, {"q": "?", "c": {"A": "x", "B": "y", "E": None}, "a": "B"}, "B", ("x", "y")),
        (PLAIN, {"q": "?", "c": {"1": "x", "2": "y"}, "a": 2}, "B", ("x", "y")),
        (COLUMNS, {"q": "?", "A": "x", "B": "y", "C": "z", "D": None, "a": "C"}, "C", ("x", "y", "z")),
        (LABELS, {"q": "?", "c": ["x", "y"], "names": ["ja", "nein"], "a": "Nein"}, "B", ("x", "y")),
        (TEXT, {"q": "?", "c": ["x", "y"], "a": " y "}, "B", ("x", "y")),
        # Numbers are written out in digits.
        (TEXT, {"q": "?", "c": [0.00001, 2], "a": 0.00001}, "A", ("0.00001", "2")),
    ],
)
def test_forms(fields: QuestionFields, row: dict[str, Any], letter: str, choices: tuple[str, ...]) -> None:
    question = read_question(row, fields, name="q", where="row 0")
    assert (question.answer, question.choices) == (letter, choices)


@pytest.mark.parametrize(
    ("fields", "row", "message"),
    [
        (PLAIN, {"q": "?", "c": ["x", None], "a": "A"}, r"row 0, field c, choice B: null is not a choice"),
        (PLAIN, {"q": "?", "c": ["x", " "], "a": "A"}, r"row 0, field c, choice B: ' ' is not a choice"),
        (PLAIN, {"q": "?", "c": {"A": None, "B": "y", "C": "z"}, "a": "B"}, r"choice A: null"),
        (
            PLAIN,
            {"q": "?", "c": {"A": "x", "B": "y", "C": None}, "a": "C"},
            r"the answer 'C' is none of the choices' labels \(A, B\)",
        ),
        (
            COLUMNS,
            {"q": "?", "A": "x", "B": None, "C": "z", "D": None, "a": "C"},
            r"field \[A, B, C, D\], choice B: null",
        ),
        (
            PLAIN,
            {"q": "?", "c": ["x", "y"], "a": 1},
            r"the answer '1' is not a letter .*fields\.answer_is index_from_0 or index_from_1",
        ),
        (
            PLAIN,
            {"q": "?", "c": ["x", "y"], "a": "y"},
            r"the answer 'y' is not a letter .*fields\.answer_is text",
        ),
        (PLAIN, {"q": "?", "c": ["x", "y"], "a": ["A", "B"]}, r"row 0, field a: 2 answers"),
        (
            PLAIN,
            {"q": "?", "c": ["x", ["y"]], "a": "A"},
            r"row 0, field c, choice B: \['y'\] \(list\) is not text",
        ),
        (PLAIN, {"q": "?", "a": "A"}, r"row 0: no field 'c' \(fields: q, a\)"),
        (PLAIN, {"q": "?", "c": {"A": "x", "a": "y"}, "a": "A"}, r"two choices have the same label"),
        (
            ARC,
            {"question": "?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "B"},
            r"none of the choices' labels \(1, 2\)",
        ),
        (
            ARC,
            {"question": "?", "choices": {"text": ["x", "y"], "label": ["A"]}, "answerKey": "A"},
            r"2 texts and 1 labels",
        ),
        (
            FROM_0,
            {"q": "?", "c": ["x", "y"], "a": 2},
            r"'2' is not the place of one of the 2 choices, counted from 0",
        ),
        (
            FROM_1,
            {"q": "?", "c": ["x", "y"], "a": 0},
            r"'0' is not the place of one of the 2 choices, counted from 1",
        ),
        (FROM_0, {"q": "?", "c": ["x", "y"], "a": True}, r"True \(bool\) is not text"),
        (FROM_0, {"q": "?", "c": ["x", "y"], "a": "A"}, r"'A' is not the place"),
        (TEXT, {"q": "?", "c": ["x", "x"], "a": "x"}, r"2 of the choices have the text 'x'"),
        (TEXT, {"q": "?", "c": ["x", "y"], "a": "z"}, r"0 of the choices have the text 'z'"),
        (
            LABELS,
            {"q": "?", "c": ["x", "y"], "names": ["ja"], "a": "ja"},
            r"field names: \['ja'\] is not a list of the 2 choices' labels",
        ),
    ],
)
def test_rows_that_do_not_say_it(fields: QuestionFields, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_question(row, fields, name="q", where="row 0")
