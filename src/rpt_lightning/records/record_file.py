"""Read and write records in a JSONL file, one record for each line.

A file that holds a whole evaluation has a JSON file about it beside it. Without that file the records are not
trusted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def write_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write one line for each row, and make the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path, parse: Callable[[str, str], T]) -> list[T]:
    """Parse each line. ``parse`` takes the line and a description of its place.

    Raises ValueError if the file is not text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). Was it cut off during writing?") from error
    # splitlines() would also split at other line separators in texts, which JSON leaves as they are.
    lines = text.split("\n")
    return [
        parse(line, f"{path} line {number}") for number, line in enumerate(lines, start=1) if line.strip()
    ]


def write_about(about: Mapping[str, Any], path: Path) -> None:
    """Write ``about`` to ``path`` with the suffix ``.json``.

    It is written last and in one piece, so that it vouches for the lines.
    """
    target = path.with_suffix(".json")
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    partial.replace(target)


def read_about(path: Path, *, command: str, needed: Collection[str]) -> dict[str, Any]:
    """Read the JSON file beside ``path``.

    Raises ValueError if one of the two files is missing, or if the JSON file is not an object with the needed
    fields. The message names the ``command`` that writes both files.
    """
    about = path.with_suffix(".json")
    for file in (path, about):
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file. `{command}` writes both {path.name} and {about.name}; run it again."
            )
    try:
        content = json.loads(about.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(
            f"{about}: not JSON ({error}). Was it cut off during writing? Run `{command}` again."
        ) from error
    if not isinstance(content, dict) or not content.keys() >= set(needed):
        raise ValueError(f"{about}: not an object with {', '.join(needed)}. Run `{command}` again.")
    return content
