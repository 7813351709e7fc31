"""The table of a run: its stages side by side, in Markdown.

No accuracy stands alone: each has its count and its 95 % interval (Wilson), and reasoning accuracy has beside it the same weights' accuracy without
reasoning (NTP) at the same positions. A reasoning policy can look better than its start and still be worse than not reasoning at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from rpt_lightning.evaluation.compare import Difference, compare_policies, paired_bootstrap
from rpt_lightning.metrics.bands import BANDS
from rpt_lightning.metrics.interval import wilson_interval
from rpt_lightning.metrics.results import PositionResult, Results

T = TypeVar("T")

INTERVAL_NOTE = (
    "Intervals in the tables are Wilson's and take positions as independent, which those of one document are not; the differences below resample whole "
    "documents."
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One column: weights with a name, such as "after RPT", and what they did."""

    name: str
    results: Results

    @property
    def has_reasoning(self) -> bool:
        """Whether every position was asked for by reasoning; weights of standard next-token training are not."""
        return all(position.reasoning_correct is not None for position in self.results.positions)


@dataclass(frozen=True, slots=True)
class Rate:
    """``successes`` of ``count``, never shown without its interval: ``ends``, or Wilson's where the outcomes are independent and so need no other.

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
        """Over the outcomes that were measured."""
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
    """The positions whose entropy (nats) exceeds ``threshold``."""
    return [position for position in positions if position.entropy > threshold]


def stage_table(stages: Sequence[Stage]) -> str:
    """One column a stage, one row a measure; the rows that a stage did not measure say so."""
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
    """Reasoning and NTP accuracy at easy / medium / hard positions, and how many there are and can be answered: three rows a band."""
    rows = []
    for name, threshold in BANDS.items():
        rows += accuracy_rows(
            name, f"entropy > {threshold}", [above(stage.results.positions, threshold) for stage in stages]
        )
    return markdown_table("by difficulty", [stage.name for stage in stages], rows)


def accuracy_rows(name: str, meaning: str, selections: Sequence[Sequence[PositionResult]]) -> list[str]:
    """Reasoning, NTP and count of the positions that were selected from each stage."""
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
    """The last stage against each earlier one, against its own NTP and against its own empty thought, each as a paired bootstrap over documents."""
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
    """One paired difference in words. ``units`` says what was resampled; without it, documents and their positions."""
    units = units or f"{difference.num_units} documents, {difference.num_positions} positions"
    return (
        f"- {name}: {100 * difference.difference:+.1f} points, {100 * difference.level:.0f} % interval "
        f"{interval_text(difference.low, difference.high)} (paired bootstrap over {units})"
    )


def interval_text(low: float, high: float) -> str:
    """Of a difference, in points. Where it lies is said of the unrounded ends.

    >>> interval_text(-0.0004, 0.02), interval_text(0.0004, 0.02)
    ('[-0.0, +2.0] contains 0', '[+0.0, +2.0] above 0')
    """
    return f"[{100 * low:+.1f}, {100 * high:+.1f}] {'above 0' if low > 0 else 'below 0' if high < 0 else 'contains 0'}"


def _control(outcomes: Sequence[bool | None]) -> str:
    """A thought control, with the number of positions where it could be measured if that is not all."""
    rate = Rate.of(outcomes)
    return (
        f"{rate} (measured at {rate.count} of {len(outcomes)})"
        if 0 < rate.count < len(outcomes)
        else str(rate)
    )


def _count(positions: Sequence[PositionResult]) -> str:
    """How many positions, and the share that a policy can get right at most."""
    if not positions:
        return "0"
    answerable = sum(position.answerable for position in positions)
    return f"{len(positions)}, {len(positions) - answerable} unanswerable: ceiling {100 * answerable / len(positions):.1f} %"


def mean_text(values: Sequence[float | None], form: str) -> str:
    """Over what was measured."""
    measured = _measured(values)
    return format(float(np.mean(measured)), form) if measured else "not measured"


def _measured(values: Sequence[T | None]) -> list[T]:
    return [value for value in values if value is not None]


def markdown_table(title: str, columns: Sequence[str], rows: Sequence[str]) -> str:
    """A head of ``title`` and the columns' names over the rows, which `markdown_row` makes."""
    return "\n".join([markdown_row(title, columns), markdown_row("---", ["---"] * len(columns)), *rows])


def markdown_row(name: str, cells: Sequence[object]) -> str:
    """One line of a table."""
    return "| " + " | ".join([name, *map(str, cells)]) + " |"
