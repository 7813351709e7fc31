"""Convert fields of a row to text.

Python's own ``str`` is never used: ``b'...'``, ``['...']`` and ``1e-05`` are not what the row contains.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

DEFAULT_SEPARATOR = "\n\n"


def look_up(row: Any, path: str) -> Any:
    """Return the value of a field, or None if there is none.

    A dot leads into nested values, and a number into a list. A field with the whole name takes precedence.

    >>> look_up({"prompt": [{"content": "2 + 2?"}], "meta.id": 7}, "prompt.0.content")
    '2 + 2?'
    >>> look_up({"meta.id": 7}, "meta.id")
    7
    """
    if isinstance(row, Mapping) and path in row:
        return row[path]
    first, dot, rest = path.partition(".")
    value = row.get(first) if isinstance(row, Mapping) else None
    if isinstance(row, list) and first.isdecimal() and int(first) < len(row):
        value = row[int(first)]
    return look_up(value, rest) if dot and value is not None else value


def as_text(value: Any, *, where: str, separator: str | None = DEFAULT_SEPARATOR) -> str:
    """Convert a value to text.

    Bytes are decoded, numbers are written out, and lists of texts are joined by ``separator``. If it is None,
    a list is an error. Raises ValueError that begins with ``where`` for every other type, since it has no
    obvious text form.

    >>> as_text(0.00001, where="row 0"), as_text([b"one", "two"], where="row 0", separator=" ")
    ('0.00001', 'one two')
    """
    if isinstance(value, (list, tuple)) and separator is not None:
        if not value:
            raise ValueError(f"{where}: an empty list, but text is needed; leave out the row or correct it")
        if all(isinstance(part, (str, bytes)) for part in value):
            return separator.join(
                as_text(part, where=f"{where}, entry {index}") for index, part in enumerate(value)
            )
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray)):
        try:
            return value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where}: bytes that are not UTF-8 (byte {error.start}); convert them, or name another field"
            ) from error
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return number_text(value, where=where)
    raise ValueError(f"{where}: {short(value)} ({type(value).__name__}) is not text; {_way_out(value)}")


def number_text(value: int | float | Decimal, *, where: str) -> str:
    """Write a number in digits, without an exponent. Raises ValueError for NaN and the infinities.

    >>> number_text(1e-5, where="row 0"), number_text(1e22, where="row 0"), number_text(2.50, where="row 0")
    ('0.00001', '10000000000000000000000', '2.5')
    """
    if not math.isfinite(value):
        raise ValueError(
            f"{where}: the number {value} cannot be written as text; correct the row or leave it out"
        )
    return (
        str(value)
        if isinstance(value, int)
        else format(Decimal(repr(value)) if isinstance(value, float) else value, "f")
    )


def fill_template(template: str, row: Any, *, where: str, separator: str = DEFAULT_SEPARATOR) -> str:
    """Build the text of one record: the template, with the row's fields in place of its braces.

    A name may lead into nested values (`look_up`).

    >>> fill_template("{problem} = {solutions.0}", {"problem": "1 + 1", "solutions": [2]}, where="line 1")
    '1 + 1 = 2'
    """
    if not isinstance(row, Mapping):
        raise ValueError(
            f"{where}: a {type(row).__name__}, but an object with the template's fields is needed"
        )
    text = ""
    for literal, name, form, conversion in _parts(template):
        text += literal
        if name is None:
            continue
        value = look_up(row, name)
        if value is None:
            raise ValueError(
                f"{where}: the template {template!r} needs the field {name!r}, "
                f"which is missing or null there (fields: {', '.join(map(str, row))}); "
                "correct --source.init_args.template or the data"
            )
        if conversion:
            raise ValueError(
                f"--source.init_args.template {template!r}: !{conversion} writes a value as Python does, "
                "not as text; leave it out"
            )
        plain = as_text(value, where=f"{where}, field {name}", separator=separator)
        try:
            text += format(value, form) if form else plain
        except ValueError as error:
            raise ValueError(
                f"{where}, field {name}: {short(value)} cannot be written as {form!r} ({error}); "
                "correct the template"
            ) from error
    return text


def _parts(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"--source.init_args.template {template!r}: {error}; double a brace that is part of the text"
        ) from error
    if any(name == "" for _, name, _, _ in parts):
        raise ValueError(
            f"--source.init_args.template {template!r}: empty braces; "
            "put a field's name there, or double them"
        )
    return parts


def short(value: Any) -> str:
    """Shorten a value for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _way_out(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        return f"name a field inside it, such as a dot and {next(iter(value))}"
    if isinstance(value, (list, tuple)):
        return "name an entry of it, such as .0 for the first, or the text inside that"
    return "name a field of text or numbers, or convert it"
