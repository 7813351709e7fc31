"""Markdown table of a run, with its stages side by side.

No accuracy stands alone. Each comes with its count and its 95 % interval (Wilson). Beside reasoning accuracy
stands the accuracy of the same weights without reasoning (NTP) at the same positions. A reasoning policy can
look better than its start and still be worse than not reasoning at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from rpt_lightning.evaluation.paired_bootstrap import Difference, compare_policies, paired_bootstrap
from rpt_lightning.metrics.difficulty_bands import BANDS
from rpt_lightning.metrics.interval import wilson_interval
from rpt_lightning.records.results import PositionResult, Results

T = TypeVar("T")

INTERVAL_NOTE = (
    "Intervals in the tables are Wilson's and treat positions as independent, although those of one document "
    "are not. The differences below resample whole documents."
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One column: weights with a name, such as "after RPT", and their results."""

    name: str
    results: Results

    @property
    def has_reasoning(self) -> bool:
        """Whether every position was answered by reasoning.

        Weights from plain next-token training are not asked to reason.
        """
        return all(position.reasoning_correct is not None for position in self.results.positions)


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate of ``successes`` among ``count`` outcomes, never shown without its interval.

    The interval is ``ends`` or, if the outcomes are independent, Wilson's.

    >>> str(Rate(50, 200))
    '25.0 % [19.5, 31.4] 50/200'
    >>> str(Rate(0, 0))
    'not measured'
    """

    successes: int
    count: int
    ends: tuple[float, float] | None = None

    @classmethod
    def of(cls, outcomes: Sequence[bool | None]) -> Rate:
        """Count the outcomes that were measured."""
        measured = _measured(outcomes)
        return cls(sum(measured), len(measured))

    @property
    def mean(self) -> float:
        return self.successes / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.successes, self.count) if self.ends is None else self.ends

    def __str__(self) -> str:
        if not self.count:
            return "not measured"
        low, high = self.interval
        return f"{100 * self.mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}] {self.successes}/{self.count}"


def above(positions: Sequence[PositionResult], threshold: float) -> list[PositionResult]:
    """Return the positions whose entropy (nats) exceeds ``threshold``."""
    return [position for position in positions if position.entropy > threshold]


def stage_table(stages: Sequence[Stage]) -> str:
    """Build the table with one column for each stage and one row for each measure.

    Cells say so if a stage did not take the measure.
    """
    all_positions = [stage.results.positions for stage in stages]
    rows = [
        markdown_row(
            "reasoning accuracy",
            [Rate.of([p.reasoning_correct for p in positions]) for positions in all_positions],
        ),
        markdown_row(
            "NTP accuracy, same positions",
            [Rate.of([p.ntp_correct for p in positions]) for positions in all_positions],
        ),
        markdown_row(
            "NTP loss (nats)",
            [mean_text([-p.ntp_logprob for p in positions], ".3f") for positions in all_positions],
        ),
        markdown_row(
            "with an empty thought",
            [_control([p.empty_thought_correct for p in positions]) for positions in all_positions],
        ),
        markdown_row(
            "with a shuffled thought",
            [_control([p.shuffled_thought_correct for p in positions]) for positions in all_positions],
        ),
        markdown_row(
            "with filler of equal length",
            [_control([p.filler_thought_correct for p in positions]) for positions in all_positions],
        ),
        markdown_row(
            "completions with a box", [Rate.of([p.boxed for p in positions]) for positions in all_positions]
        ),
        markdown_row(
            "truncated completions",
            [Rate.of([p.truncated for p in positions]) for positions in all_positions],
        ),
        markdown_row(
            "mean length (tokens)",
            [mean_text([p.length for p in positions], ".1f") for positions in all_positions],
        ),
        markdown_row(
            "ceiling (answerable positions)",
            [Rate.of([p.answerable for p in positions]) for positions in all_positions],
        ),
    ]
    return markdown_table("held-out positions", [stage.name for stage in stages], rows)


def difficulty_table(stages: Sequence[Stage]) -> str:
    """Build the table of reasoning and NTP accuracy at easy, medium and hard positions.

    Each band has three rows. The third counts its positions and those that can be answered.
    """
    rows = []
    for name, threshold in BANDS.items():
        rows += accuracy_rows(
            name, f"entropy > {threshold}", [above(stage.results.positions, threshold) for stage in stages]
        )
    return markdown_table("by difficulty", [stage.name for stage in stages], rows)


def accuracy_rows(name: str, meaning: str, selections: Sequence[Sequence[PositionResult]]) -> list[str]:
    """Build the rows of reasoning, NTP and count for the positions selected from each stage."""
    return [
        markdown_row(
            f"{name} ({meaning}): reasoning",
            [Rate.of([p.reasoning_correct for p in positions]) for positions in selections],
        ),
        markdown_row(
            f"{name}: NTP, same positions",
            [Rate.of([p.ntp_correct for p in positions]) for positions in selections],
        ),
        markdown_row(f"{name}: positions", [_count(positions) for positions in selections]),
    ]


def comparison_lines(stages: Sequence[Stage]) -> list[str]:
    """Compare the last stage with each earlier one, with its own NTP and with its own empty thought.

    Each comparison is a paired bootstrap over documents.
    """
    last = stages[-1]
    if not last.has_reasoning:
        return []
    positions = last.results.positions
    lines = [
        comparison_line(
            f"reasoning {last.name} - reasoning {earlier.name}",
            compare_policies(earlier.results, last.results),
        )
        for earlier in reversed(stages[:-1])
        if earlier.has_reasoning
    ]
    for name, outcomes in (
        ("NTP", [p.ntp_correct for p in positions]),
        ("an empty thought", [p.empty_thought_correct for p in positions]),
    ):
        pairs = [
            (outcome, bool(p.reasoning_correct), p.doc_id)
            for outcome, p in zip(outcomes, positions, strict=True)
            if outcome is not None
        ]
        if pairs:
            without, reasoning, units = zip(*pairs, strict=True)
            lines.append(
                comparison_line(
                    f"reasoning {last.name} - {name} of the same weights",
                    paired_bootstrap(without, reasoning, units=units),
                )
            )
    return lines


def comparison_line(name: str, difference: Difference, *, units: str | None = None) -> str:
    """Describe one paired difference.

    ``units`` names what was resampled. Without it, the line counts documents and their positions.
    """
    units = units or f"{difference.num_units} documents, {difference.num_positions} positions"
    return (
        f"- {name}: {100 * difference.difference:+.1f} points, {100 * difference.level:.0f} % interval "
        f"{interval_text(difference.low, difference.high)} (paired bootstrap over {units})"
    )


def interval_text(low: float, high: float) -> str:
    """Format the interval of a difference, in points.

    The comparison with 0 uses the unrounded ends.

    >>> interval_text(-0.0004, 0.02), interval_text(0.0004, 0.02)
    ('[-0.0, +2.0] contains 0', '[+0.0, +2.0] above 0')
    """
    return (
        f"[{100 * low:+.1f}, {100 * high:+.1f}] "
        f"{'above 0' if low > 0 else 'below 0' if high < 0 else 'contains 0'}"
    )


def _control(outcomes: Sequence[bool | None]) -> str:
    """Format a thought control, with the number of measured positions if it is not all of them."""
    rate = Rate.of(outcomes)
    return (
        f"{rate} (measured at {rate.count} of {len(outcomes)})"
        if 0 < rate.count < len(outcomes)
        else str(rate)
    )


def _count(positions: Sequence[PositionResult]) -> str:
    """Format the number of positions and the highest share that a policy can get right."""
    if not positions:
        return "0"
    answerable = sum(position.answerable for position in positions)
    return (
        f"{len(positions)}, {len(positions) - answerable} unanswerable: "
        f"ceiling {100 * answerable / len(positions):.1f} %"
    )


def mean_text(values: Sequence[float | None], form: str) -> str:
    """Format the mean of the measured values."""
    measured = _measured(values)
    return format(float(np.mean(measured)), form) if measured else "not measured"


def _measured(values: Sequence[T | None]) -> list[T]:
    return [value for value in values if value is not None]


def markdown_table(title: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    """Build a table with ``title`` and the column names above the rows, which come from `markdown_row`."""
    return "\n".join([markdown_row(title, columns), markdown_row("---", ["---"] * len(columns)), *rows])


def markdown_row(name: str, cells: Sequence[object]) -> str:
    """Build one line of a table."""
    return "| " + " | ".join([name, *map(str, cells)]) + " |"
