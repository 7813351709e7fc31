"""Sources of questions with a verifiable answer.

A source yields the same questions in the same order every time.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rpt_lightning.data.sources.choices import AnswerForm, read_choices, right_letter
from rpt_lightning.data.sources.hub_rows import read_dataset
from rpt_lightning.data.sources.jsonl import read_records
from rpt_lightning.data.sources.row_text import as_text, look_up, short
from rpt_lightning.objectives.math.number_text import plain_number
from rpt_lightning.types import Question

_NO_ANSWERS = ("nan", "inf", "#n/a")


@dataclass(frozen=True, kw_only=True)
class QuestionFields:
    """The fields of a row that make a question.

    A name may lead into nested values: ``reward_model.ground_truth``, ``prompt.0.content``.

    Args:
        question: Field with the text of the question.
        answer: Field with the true answer, as text or a number. A list of one answer, which may be written as
            JSON, counts as that answer. With choices, the answer says which choice is right.
        choices: Field with a list of texts, lettered from A, or with an object of texts by label. Several
            names give one choice each. None for questions that Math-Verify checks.
        labels: Field with the names of the choices, as a list of the same length. Needed if the answer is one
            of these names.
        answer_is: How the answer says which choice is right. "letter": by its label, or by its letter if
            there are no labels. "index_from_0" or "index_from_1": by its place. "text": by its text.
        category: Field to group results by. None does not group them.
        id: Field that identifies a question. None uses the row's number.
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
        """Yield all questions in a fixed order.

        Raises ValueError that names the file or dataset, the row and the field at fault.
        """


class JsonlQuestions(QuestionSource):
    """Questions from JSON lines, one object per line.

    Args:
        path: A file, a folder of files, or a pattern. Files may be compressed. A ``.json`` file may hold one
            list of objects.
        fields: The fields that make a question.
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
        split: Split of the dataset.
        fields: The fields of a row that make a question.
        config_name: Configuration of the dataset, if it has several.
        revision: Commit to read.
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
    """Read all questions of a source. Raises ValueError if there are none or if an id occurs twice."""
    questions = tuple(source.questions())
    if not questions:
        raise ValueError(f"--{flag}: the source holds no questions")
    seen: set[str] = set()
    for question in questions:
        if question.question_id in seen:
            raise ValueError(
                f"--{flag}: two questions have the id {question.question_id!r}; "
                "name another field with fields.id, or null for row numbers"
            )
        seen.add(question.question_id)
    return questions


def read_question(row: Any, fields: QuestionFields, *, name: str, where: str) -> Question:
    """Read one row as a question. ``name`` is its id if no field holds one.

    Raises ValueError that begins with ``where``.
    """
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
            f"{where}, field {fields.question}: {short(text)} is not the text of a question; "
            "name its field with fields.question (a dot leads into nested values)"
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
            f"{where}: no field {path!r} (fields: {names}); "
            "name the fields to read with fields.question, fields.answer and so on"
        )
    return value


def _single(value: Any, where: str) -> Any:
    """Return the answer of a list that holds nothing else."""
    # Skywork-OR1 writes a list of one answer as JSON.
    if isinstance(value, str) and value.lstrip().startswith('["'):
        with contextlib.suppress(json.JSONDecodeError):  # an answer that only looks like a list at first
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
        raise ValueError(f"{where}: {short(value)} is not an answer; an answer is text or a number")
    text = as_text(value, where=where).strip()
    if not text:
        raise ValueError(f"{where}: {short(value)} is not an answer; an answer is text or a number")
    if text.lower().lstrip("+-") in _NO_ANSWERS:
        raise ValueError(
            rf"{where}: {text!r} is what programs write for a missing value; "
            rf"correct it or leave out the row (infinity is \infty)"
        )
    return plain_number(text)
