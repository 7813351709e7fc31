"""Lines of a plan: tables, and paragraphs that fit a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

WIDTH = 98
INDENT = "  "
GB = 1e9


def gb(size: float) -> str:
    """Format bytes as a cell in GB. The spaces leave room for a mark in the header."""
    return "-  " if size == 0 else f"{size / GB:,.2f}  "


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(max(width, 11))
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def bullets(texts: Sequence[str]) -> list[str]:
    """Wrap paragraphs, with all lines but the first of each indented."""
    return [line for text in texts for line in wrap(text, indent=INDENT)]


def wrap(text: str, indent: str = "") -> list[str]:
    """Wrap a paragraph. ``indent`` begins all lines but the first."""
    return textwrap.wrap(
        text, WIDTH - len(INDENT), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
