"""Read JSON records, one per line or in one list. Errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpt_lightning.data.sources.data_files import (
    DataFile,
    find_files,
    read_lines,
    read_text,
    without_compression,
)

ENDINGS = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A value of a file. ``file`` and ``number`` identify it, and ``where`` names it in errors."""

    file: DataFile
    number: int
    where: str
    value: Any


def read_records(path: str | Path, *, name: str, what: str = "file") -> Iterator[Record]:
    """Yield the records of a file, a folder's files or the files of a pattern, in order (`find_files`).

    A ``.json`` file may also hold one list, whose entries are the records. Raises ValueError that names the
    file and the line.
    """
    for file in find_files(path, name=name, endings=ENDINGS, what=what):
        if without_compression(file.name).lower().endswith(".json") and _first_character(file.path) == "[":
            for number, value in enumerate(read_json(file.path, name=str(file.path)), start=1):
                yield Record(file=file, number=number, where=f"{file.path}, entry {number}", value=value)
            continue
        for number, value in read_jsonl(file.path, name=str(file.path)):
            yield Record(file=file, number=number, where=f"{file.path}, line {number}", value=value)


def read_jsonl(path: Path, *, name: str) -> Iterator[tuple[int, Any]]:
    r"""Yield ``(line number from 1, value)`` of every line that is not blank.

    Only ``\n`` ends a line, because many files have U+2028 and the like unescaped in their strings. Raises
    ValueError that begins with ``name`` and the line if a line is not UTF-8 or not JSON.
    """
    for number, line in read_lines(path, name=name):
        if line.strip():
            yield number, _parsed(line, f"{name}, line {number}", "repair or remove the line")


def read_json(path: Path, *, name: str) -> Any:
    """Read the value of a whole file. Raises ValueError that begins with ``name``."""
    return _parsed(read_text(path, name=name), name, "a file with one object per line is named .jsonl")


def _parsed(text: str, where: str, way_out: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.rstrip() else ""
        raise ValueError(
            f"{where}{line}: broken JSON ({error.msg} at column {error.colno}); {way_out}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or endless brackets
        raise ValueError(f"{where}: JSON that cannot be read ({error}); {way_out}") from error


def _first_character(path: Path) -> str:
    """Return the file's first character that is not blank."""
    return next((line.strip()[0] for _, line in read_lines(path, name=str(path)) if line.strip()), "")
