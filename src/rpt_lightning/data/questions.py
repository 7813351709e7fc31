"""Where questions with a verifiable answer come from. A source yields the same questions in the same order every time."""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpt_lightning.data.jsonl import read_jsonl
from rpt_lightning.tasks.question_text import LETTERS
from rpt_lightning.types import Question


@dataclass(frozen=True, kw_only=True)
class QuestionFields:
    """Which fields of a row make a question. A name may lead into nested values: ``reward_model.ground_truth``, ``prompt.0.content``.

    Args:
        question: Its text.
        answer: The true answer, as text or number; a list of one, also written as JSON, is that one. With choices the letter of the right one.
        choices: A list of texts, lettered from A; None for questions that Math-Verify checks.
        category: What results are grouped by; None: not grouped.
        id: Tells questions apart; None: the row's number.
    """

    question: str = "problem"
    answer: str = "answer"
    choices: str | None = None
    category: str | None = None
    id: str | None = None


class QuestionSource(ABC):
    """Questions with their answers."""

    @abstractmethod
    def questions(self) -> Iterator[Question]:
        """All questions, in a fixed order. Raises ValueError that names the file or dataset, the row and the field at fault."""


class JsonlQuestions(QuestionSource):
    """Args:
    path: One JSON object a line.
    fields: Which of its fields make a question.
    """

    def __init__(self, path: str, fields: QuestionFields = QuestionFields()) -> None:
        self.path = Path(path)
        self.fields = fields

    def questions(self) -> Iterator[Question]:
        if not self.path.is_file():
            raise ValueError(f"{self.path}: there is no such file of questions")
        for number, row in read_jsonl(self.path, name=str(self.path)):
            yield read_question(row, self.fields, name=f"{self.path.stem}:{number}", where=f"{self.path}, line {number}")


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
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError("HuggingFaceQuestions needs the datasets package: pip install 'datasets>=3'") from error
        for number, row in enumerate(load_dataset(self.name, self.config_name, split=self.split, revision=self.revision)):
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
    text, answer = _value(row, fields.question, where), _answer(_value(row, fields.answer, where), f"{where}, field {fields.answer}")
    choices: tuple[str, ...] = ()
    if fields.choices is not None:
        listed = _value(row, fields.choices, where)
        if not isinstance(listed, list) or not 2 <= len(listed) <= len(LETTERS):
            raise ValueError(f"{where}, field {fields.choices}: {_short(listed)} where a list of 2 to {len(LETTERS)} choices belongs")
        choices = tuple(map(str, listed))
        if answer not in LETTERS[: len(choices)]:
            raise ValueError(
                f"{where}, field {fields.answer}: the answer {answer!r} is not a letter of the {len(choices)} choices (A to {LETTERS[len(choices) - 1]})"
            )
    return Question(
        question_id=name if fields.id is None else str(_value(row, fields.id, where)),
        text=str(text).strip(),
        answer=answer,
        choices=choices,
        category=None if fields.category is None else str(_value(row, fields.category, where)),
    )


def _value(row: Any, path: str, where: str) -> Any:
    value = row
    for part in path.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            names = ", ".join(map(str, row)) if isinstance(row, Mapping) else _short(row)
            raise ValueError(
                f"{where}: no field {path!r} (there is: {names}); say with fields.question, fields.answer and so on which fields to read"
            )
    return value


def _answer(value: Any, where: str) -> str:
    if isinstance(value, str) and value.lstrip().startswith('["'):  # Skywork-OR1 writes a list of one answer as JSON
        with contextlib.suppress(json.JSONDecodeError):  # an answer that only begins like one
            value = json.loads(value)
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{where}: {len(value)} answers ({_short(value)}), and a question needs exactly one")
        (value,) = value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise ValueError(f"{where}: {_short(value)} is no answer; a text or a number belongs there")
    return str(value).strip()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
