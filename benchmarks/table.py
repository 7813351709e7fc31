"""Write the table of the stored figures between marker comments in docs/performance.md.

python benchmarks/table.py            # writes it there and prints it
python benchmarks/table.py --check    # exit status 1 if the document differs from benchmarks/results/
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from result import MAX_OTHER_LOAD, Result, read_results

from rpt_lightning.evaluation.marked_section import replace_section

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- benchmarks: made by benchmarks/table.py -->", "<!-- end of benchmarks -->"


def render(results: list[Result]) -> str:
    """Format the figures in Markdown. A machine or commit that several figures share is named once, below."""
    if not results:
        return "Nothing is measured yet: `make bench`."
    lines = ["| figure | value | limit | target | met |", "|---|---|---|---|---|", *map(_row, results), ""]
    machines = dict.fromkeys(
        f"{result.machine} ({result.device}, {result.threads} threads, torch {result.torch})"
        for result in results
    )
    commits = dict.fromkeys(result.commit for result in results)
    dates = sorted(result.date[:10] for result in results)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    lines.append(
        f"Machine: {'; '.join(machines)}. {'Commit' if len(commits) == 1 else 'Commits'} "
        f"{', '.join(commits)}; {when}."
    )
    return "\n".join(lines)


def _row(result: Result) -> str:
    met = {True: "yes", False: "**no**", None: ""}[result.is_met]
    disturbed = (
        f" (other processes took {result.other_load:.0%} of the CPU time)"
        if result.other_load > MAX_OTHER_LOAD
        else ""
    )
    return (
        f"| `{result.name}` | {number(result.value)} {result.unit}{disturbed} | {number(result.limit)} "
        f"| {_target(result)} | {met} |"
    )


def _target(result: Result) -> str:
    if result.target is None:
        return ""
    bound = f"{'at most' if result.lower_is_better else 'at least'} {number(result.target)}"
    share = result.details.get("target_share_of_limit")
    return (
        bound
        if share is None
        else f"{bound} ({share:.0%} of the limit; reached: {result.value / result.limit:.0%})"
    )


def number(value: float) -> str:
    """Format a number with three significant digits.

    >>> [number(value) for value in (0.01234, 0.0, 1.0, 8.7654, 123.4, 1500.0)]
    ['0.0123', '0', '1.00', '8.77', '123', '1500']
    """
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.{2 if abs(value) < 10 else 1}f}"


def with_table(text: str, table: str) -> str:
    """Return a document with a new table between its markers."""
    return replace_section(text, f"{table}\n", begin=BEGIN, end=END, where="the document")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    results = read_results()
    text = DOCUMENT.read_text()
    updated = with_table(text, render(results))
    if args.check:
        if updated != text:
            sys.exit(
                f"{DOCUMENT.relative_to(ROOT)}: the table does not match benchmarks/results/; "
                "run python benchmarks/table.py"
            )
        return
    DOCUMENT.write_text(updated)
    print(render(results))


if __name__ == "__main__":
    main()
