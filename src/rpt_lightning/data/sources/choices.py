"""Read a question's choices, and which one is right, in the forms that datasets use.

Choices may be ``["3", "4"]``, ``{"A": "3", "B": "4"}``, ``{"text": ["3", "4"], "label": ["A", "B"]}`` (ARC),
``[{"text": "3", "label": "A"}, ...]``, or one field each. The answer may be a label or a letter (``B``,
``b``, ``(B)``, ``B.``), an index from 0 (MMLU) or from 1, or the text of the right choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rpt_lightning.data.sources.row_text import as_text, look_up, short
from rpt_lightning.objectives.question_text import LETTERS
from rpt_lightning.objectives.rewards.answer import choice_letter

AnswerForm = Literal["letter", "index_from_0", "index_from_1", "text"]
Labels = tuple[str, ...] | None


def read_choices(
    row: Any, field: str | list[str], labels_field: str | None, *, where: str
) -> tuple[tuple[str, ...], Labels]:
    """Read a row's choices, and their labels if it has any. Raises ValueError that begins with ``where``."""
    name = field if isinstance(field, str) else "[" + ", ".join(field) + "]"
    at = f"{where}, field {name}"
    value = look_up(row, field) if isinstance(field, str) else [look_up(row, part) for part in field]
    if value is None:
        raise ValueError(
            f"{where}: no field {field!r} (fields: {', '.join(map(str, row))}); "
            "name the one with the choices in fields.choices"
        )
    listed, labels = _listed(value, at) if isinstance(field, str) else (_without_absent(value), None)
    if labels_field is not None:
        labels = look_up(row, labels_field)
        if not isinstance(labels, list) or len(labels) != len(listed):
            raise ValueError(
                f"{where}, field {labels_field}: {short(labels)} "
                f"is not a list of the {len(listed)} choices' labels"
            )
    if not 2 <= len(listed) <= len(LETTERS):
        raise ValueError(f"{at}: {short(listed)} is not a list of 2 to {len(LETTERS)} choices")
    texts = tuple(
        _choice(value, f"{at}, choice {letter}") for letter, value in zip(LETTERS, listed, strict=False)
    )
    if labels is None:
        return texts, None
    keys = tuple(_key(label, at) for label in labels)
    if len(set(keys)) < len(keys):
        raise ValueError(
            f"{at}: two choices have the same label ({', '.join(keys)}), "
            "so the answer does not say which is right; correct the row"
        )
    return texts, keys


def right_letter(answer: Any, choices: Sequence[str], labels: Labels, form: AnswerForm, *, where: str) -> str:
    """Return the letter of the right choice by its position. Raises ValueError that begins with ``where``."""
    text = as_text(answer, where=where, separator=None).strip()
    if form == "text":
        places = [place for place, choice in enumerate(choices) if choice.strip() == text]
        if len(places) != 1:
            raise ValueError(
                f"{where}: {len(places)} of the choices have the text {short(text)}, "
                "and exactly one is right; correct the row"
            )
        return LETTERS[places[0]]
    if form != "letter":
        first = 0 if form == "index_from_0" else 1
        if not text.isdecimal() or not first <= int(text) < first + len(choices):
            raise ValueError(
                f"{where}: {short(text)} is not the place of one of the {len(choices)} choices, "
                f"counted from {first}; correct the row or fields.answer_is"
            )
        return LETTERS[int(text) - first]
    if labels is not None:
        key = _key(text, where)
        if key not in labels:
            raise ValueError(
                f"{where}: the answer {short(text)} is none of the choices' labels ({', '.join(labels)}); "
                "correct the row or fields.answer_is"
            )
        return LETTERS[labels.index(key)]
    letter = choice_letter(text)
    if letter is None or letter not in LETTERS[: len(choices)]:
        last = LETTERS[len(choices) - 1]
        raise ValueError(
            f"{where}: the answer {text!r} is not a letter of the {len(choices)} choices (A to {last})"
            f"{_hint(text, choices)}"
        )
    return letter


def _hint(text: str, choices: Sequence[str]) -> str:
    if text.isdecimal():
        return "; if it is a place, say how it is counted: fields.answer_is index_from_0 or index_from_1"
    if text in [choice.strip() for choice in choices]:
        return "; if it is the right one's text, say so: fields.answer_is text"
    return "; say with fields.answer_is how it names the right one"


def _listed(value: Any, where: str) -> tuple[list[Any], Any]:
    """Return the choices as a list, and the labels that come with them."""
    if isinstance(value, Mapping):
        if (
            {"text", "label"} <= set(value)
            and isinstance(value["text"], list)
            and isinstance(value["label"], list)
        ):
            if len(value["text"]) != len(value["label"]):
                raise ValueError(
                    f"{where}: {len(value['text'])} texts and {len(value['label'])} labels; correct the row"
                )
            return value["text"], value["label"]
        texts = _without_absent(list(value.values()))
        return texts, list(value)[: len(texts)]
    if (
        isinstance(value, list)
        and value
        and all(isinstance(part, Mapping) and {"text", "label"} <= set(part) for part in value)
    ):
        return [part["text"] for part in value], [part["label"] for part in value]
    if not isinstance(value, list):
        raise ValueError(f"{where}: {short(value)} is not a list of 2 to {len(LETTERS)} choices")
    return value, None


def _without_absent(values: list[Any]) -> list[Any]:
    """Drop nulls at the end: every row of a table has every column, so short lists end with nulls."""
    while values and values[-1] is None:
        values = values[:-1]
    return values


def _choice(value: Any, where: str) -> str:
    text = "" if value is None else as_text(value, where=where, separator=None)
    if not text.strip():
        raise ValueError(
            f"{where}: {'null' if value is None else repr(text)} is not a choice; "
            "correct the row or leave it out"
        )
    return text


def _key(label: Any, where: str) -> str:
    """Normalise a label for comparison with answers: ignore case and brackets."""
    text = as_text(label, where=where, separator=None).strip()
    return choice_letter(text) or text.strip("().: ").casefold()
