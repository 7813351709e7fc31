"""Records in a JSONL file, one a line, and where it holds those of a whole evaluation a JSON file about them beside it, without which they are not trusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def write_lines(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """One line a row; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_lines(path: Path, parse: Callable[[str, str], T]) -> list[T]:
    """What ``parse`` makes of each line and of where it stands, in words."""
    # Not splitlines(): texts may hold other line separators, which JSON leaves as they are.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [parse(line, f"{path} line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def write_about(about: Mapping[str, Any], path: Path) -> None:
    """``path`` with the suffix ``.json``. Written last, so that it vouches for the lines."""
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def read_about(path: Path, *, command: str) -> dict[str, Any]:
    """What stands beside ``path``. Raises ValueError where one of the two files is missing, with the ``command`` that writes both."""
    about = path.with_suffix(".json")
    for needed in (path, about):
        if not needed.is_file():
            raise ValueError(f"{needed}: no such file. `{command}` writes both {path.name} and {about.name}; run it again.")
    return dict(json.loads(about.read_text(encoding="utf-8")))
