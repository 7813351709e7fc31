"""JSON Lines, with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: Path, *, name: str) -> Iterator[tuple[int, Any]]:
    r"""``(line number from 1, value)`` of every line that is not blank.

    Lines end at ``\n`` alone: U+2028 and the like stand unescaped in the strings of many files. Raises ValueError that begins with ``name`` and the
    line, where one is not UTF-8 or no JSON.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{name}, line {number}: not UTF-8 (byte {error.start} of the line); convert the file") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}, line {number}: broken JSON ({error.msg} at column {error.colno}); repair or remove the line") from error
