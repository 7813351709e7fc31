"""The tables of docs/metrics.md, which describe every metric that a run logs.

python scripts/metrics_page.py            # writes the tables
python scripts/metrics_page.py --check    # exits with status 1 if the document has other tables

The descriptions are in `rpt_lightning.metrics.registry`. The text above the tables is written by hand.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rpt_lightning.evaluation.marked_section import replace_section
from rpt_lightning.metrics.metric import Section
from rpt_lightning.metrics.registry import SECTIONS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "metrics.md"
BEGIN, END = "<!-- made by scripts/metrics_page.py -->", "<!-- end of tables -->"
HEADERS = {"meaning": "meaning", "unit": "unit", "normal": "normal", "watch_for": "warning sign"}
WIDTH = 100  # of the lines of docs/


def page(text: str, sections: Sequence[Section]) -> str:
    """Return the document with new sections between its markers."""
    return replace_section(
        text, "\n\n".join(map(_section, sections)) + "\n", begin=BEGIN, end=END, where=str(DOCUMENT)
    )


def _section(section: Section) -> str:
    heading = f"## {section.title}\n"
    table = [
        _line("metric", *(HEADERS[column] for column in section.columns)),
        "|" + "---|" * (1 + len(section.columns)),
        *(
            _line(
                ", ".join(f"`{name}`" for name in row.names),
                *(getattr(row.metrics[0], column) for column in section.columns),
            )
            for row in section.rows
        ),
    ]
    before = f"{_paragraph(section.before)}\n\n" if section.before else ""
    after = f"\n\n{_paragraph(section.after)}" if section.after else ""
    return heading + before + "\n".join(table) + after


def _paragraph(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _line(*cells: str) -> str:
    """Format a line of a table.

    >>> _line("`a`", "", "tokens")
    '| `a` | | tokens |'
    """
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    text = DOCUMENT.read_text(encoding="utf-8")
    updated = page(text, SECTIONS)
    if args.check and updated != text:
        sys.exit(
            f"{DOCUMENT.relative_to(ROOT)}: not the registered metrics; run python scripts/metrics_page.py"
        )
    if not args.check:
        DOCUMENT.write_text(updated, encoding="utf-8")


if __name__ == "__main__":
    main()
