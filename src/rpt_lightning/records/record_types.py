"""Check that the fields of a record read from JSON have the types that its class declares."""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_NAMES = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}


def check_types(values: Mapping[str, Any], record: type, where: str) -> None:
    """Raise ValueError if a field has another type than ``record`` declares.

    The message begins with ``where`` and names the first such field. Fields that ``record`` does not have are
    not checked.
    """
    hints = _hints(record)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            text = repr(value)
            raise ValueError(
                f"{where}: {name} is {text if len(text) <= 60 else text[:60] + '...'}, "
                f"where {_words(hints[name])} belongs."
            )


@cache
def _hints(record: type) -> dict[str, Any]:
    return get_type_hints(record)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(part, args[0]) for part in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(part, args[1]) for part in value.values())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint in (int, str, bool):
        return type(value) is hint
    return value is None if hint is type(None) else True


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(arg) for arg in args if not (arg is int and float in args))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        return f"a list with {_words(args[0])} as each entry"
    if origin is Mapping:
        return f"an object with {_words(args[1])} as each value"
    return "null" if hint is type(None) else _NAMES.get(hint, "an object")
