"""Where questions with a verifiable answer come from. A source yields the same questions in the same order every time."""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rpt_lightning.data.choices import AnswerForm, read_choices, right_letter
from rpt_lightning.data.hub_rows import read_dataset
from rpt_lightning.data.jsonl import read_records
from rpt_lightning.data.row_text import as_text, look_up, short
from rpt_lightning.tasks.number_text import plain_number
from rpt_lightning.types import Question

_NO_ANSWERS = ("nan", "inf", "#n/a")


@dataclass(frozen=True, kw_only=True)
class QuestionFields:
    """Which fields of a row make a question. A name may lead into nested values: ``reward_model.ground_truth``, ``prompt.0.content``.

    Args:
        question: Its text.
        answer: The true answer, as text or number; a list of one, also written as JSON, is that one. With choices it says which is right.
        choices: A list of texts, lettered from A, or an object of them by label; several names: one choice each. None for questions that
            Math-Verify checks.
        labels: The choices' own names, a list as long as theirs, where the answer is one of those.
        answer_is: How the answer says which choice is right: by its label, else its letter; by its place, counted from 0 or from 1; or by its text.
        category: What results are grouped by; None: not grouped.
        id: Tells questions apart; None: the row's number.
    """

    question: str = "problem"
    answer: str = "answer"
    choices: str | list[str] | None = None
    labels: str | None = None
    answer_is: AnswerForm = "letter"
    category: str | None = None
    id: str | None = None


class QuestionSource(ABC):
    """Questions with their answers."""

    @abstractmethod
    def questions(self) -> Iterator[Question]:
        """All questions, in a fixed order. Raises ValueError that names the file or dataset, the row and the field at fault."""


class JsonlQuestions(QuestionSource):
    """Args:
    path: One JSON object a line: a file, a folder of them, or a pattern; compressed or not. A ``.json`` file may hold one list of objects.
    fields: Which of its fields make a question.
    """

    def __init__(self, path: str, fields: QuestionFields = QuestionFields()) -> None:
        self.path = path
        self.fields = fields

    def questions(self) -> Iterator[Question]:
        for record in read_records(self.path, name=str(self.path), what="file of questions"):
            yield read_question(
                record.value, self.fields, name=f"{record.file.stem}:{record.number}", where=record.where
            )


class HuggingFaceQuestions(QuestionSource):
    """A split of a Hugging Face dataset (``pip install 'rpt-lightning[datasets]'``).

    Args:
        name: Hub id, or a folder that `datasets` reads.
        split: Of the dataset.
        fields: Which fields of a row make a question.
        config_name: The dataset's configuration, where it has several.
        revision: Pins a commit.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        fields: QuestionFields = QuestionFields(),
        config_name: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.name = name
        self.split = split
        self.fields = fields
        self.config_name = config_name
        self.revision = revision

    def questions(self) -> Iterator[Question]:
        for number, row in enumerate(
            read_dataset(self.name, self.config_name, split=self.split, revision=self.revision)
        ):
            where = f"dataset {self.name}, split {self.split}, row {number} (from 0)"
            yield read_question(row, self.fields, name=f"{self.name}/{self.split}:{number}", where=where)


def read_all(source: QuestionSource, *, flag: str) -> tuple[Question, ...]:
    """All questions of a source. Raises ValueError where there are none, or an id occurs twice."""
    questions = tuple(source.questions())
    if not questions:
        raise ValueError(f"--{flag}: the source holds no questions")
    seen: set[str] = set()
    for question in questions:
        if question.question_id in seen:
            raise ValueError(
                f"--{flag}: two questions have the id {question.question_id!r}; name another field with fields.id, or null for row numbers"
            )
        seen.add(question.question_id)
    return questions


def read_question(row: Any, fields: QuestionFields, *, name: str, where: str) -> Question:
    """One row as a question; ``name`` is its id where no field holds one. Raises ValueError that begins with ``where``."""
    text = _value(row, fields.question, where)
    answer = _single(_value(row, fields.answer, where), f"{where}, field {fields.answer}")
    choices: tuple[str, ...] = ()
    if fields.choices is None:
        true_answer = _answer(answer, f"{where}, field {fields.answer}")
    else:
        choices, labels = read_choices(row, fields.choices, fields.labels, where=where)
        true_answer = right_letter(
            answer, choices, labels, fields.answer_is, where=f"{where}, field {fields.answer}"
        )
    if not isinstance(text, (str, bytes)) or not text.strip():
        raise ValueError(
            f"{where}, field {fields.question}: {short(text)} is no question, which is a text; name its field with fields.question (a dot leads into "
            "nested values)"
        )
    return Question(
        question_id=name if fields.id is None else _name(row, fields.id, where),
        text=as_text(text, where=f"{where}, field {fields.question}").strip(),
        answer=true_answer,
        choices=choices,
        category=None if fields.category is None else _name(row, fields.category, where),
    )


def _name(row: Any, path: str, where: str) -> str:
    return as_text(_value(row, path, where), where=f"{where}, field {path}", separator=None)


def _value(row: Any, path: str, where: str) -> Any:
    value = look_up(row, path)
    if value is None:
        names = ", ".join(map(str, row)) if isinstance(row, Mapping) else short(row)
        raise ValueError(
            f"{where}: no field {path!r} (there is: {names}); say with fields.question, fields.answer and so on which fields to read"
        )
    return value


def _single(value: Any, where: str) -> Any:
    """The answer of a list that holds nothing else."""
    if isinstance(value, str) and value.lstrip().startswith(
        '["'
    ):  # Skywork-OR1 writes a list of one answer as JSON
        with contextlib.suppress(json.JSONDecodeError):  # an answer that only begins like one
            value = json.loads(value)
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(
                f"{where}: {len(value)} answers ({short(value)}), and a question needs exactly one"
            )
        (value,) = value
    return value


def _answer(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, bytes, int, float, Decimal)):
        raise ValueError(f"{where}: {short(value)} is no answer; a text or a number belongs there")
    text = as_text(value, where=where).strip()
    if not text:
        raise ValueError(f"{where}: {short(value)} is no answer; a text or a number belongs there")
    if text.lower().lstrip("+-") in _NO_ANSWERS:
        raise ValueError(
            rf"{where}: {text!r} is what programs write for a missing value; correct it or leave out the row (infinity is \infty)"
        )
    return plain_number(text)
