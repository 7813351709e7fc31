"""The table of a run: its stages side by side, in Markdown.

No accuracy stands alone: each has its count and its 95 % interval (Wilson), and reasoning accuracy has beside it the same weights' accuracy without
reasoning (NTP) at the same positions. A reasoning policy can look better than its start and still be worse than not reasoning at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rpt_lightning.evaluation.compare import Difference, compare_policies, paired_bootstrap
from rpt_lightning.evaluation.results import PositionResult, Results
from rpt_lightning.metrics.interval import wilson_interval

# The evaluation splits of the paper (section 4.1): positions whose entropy (nats) exceeds the threshold. Each contains the next.
DIFFICULTIES = {"easy": 0.5, "medium": 1.0, "hard": 1.5}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One column: weights with a name, such as "after RPT", and what they did."""

    name: str
    results: Results


@dataclass(frozen=True, slots=True)
class Rate:
    """``successes`` of ``count``, never shown without its interval.

    >>> str(Rate(50, 200))
    '25.0 % [19.5, 31.4] 50/200'
    >>> str(Rate(0, 0))
    'no positions'
    """

    successes: int
    count: int

    @classmethod
    def of(cls, outcomes: Sequence[bool]) -> Rate:
        return cls(sum(outcomes), len(outcomes))

    @property
    def mean(self) -> float:
        return self.successes / self.count

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.successes, self.count)

    def __str__(self) -> str:
        if not self.count:
            return "no positions"
        low, high = self.interval
        return f"{100 * self.mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}] {self.successes}/{self.count}"


def above(positions: Sequence[PositionResult], threshold: float) -> list[PositionResult]:
    """The positions whose entropy (nats) exceeds ``threshold``."""
    return [position for position in positions if position.entropy > threshold]


def stage_table(stages: Sequence[Stage]) -> str:
    """One column a stage, one row a measure; the rows that a stage did not measure say so."""
    all_positions = [stage.results.positions for stage in stages]
    rows = [
        _row("reasoning accuracy", [Rate.of([p.reasoning_correct for p in positions]) for positions in all_positions]),
        _row("NTP accuracy, same positions", [Rate.of([p.ntp_correct for p in positions]) for positions in all_positions]),
        _row("NTP loss (nats)", [_mean([-p.ntp_logprob for p in positions], ".3f") for positions in all_positions]),
        _row("with an empty thought", [_control([p.empty_thought_correct for p in positions]) for positions in all_positions]),
        _row("with a shuffled thought", [_control([p.shuffled_thought_correct for p in positions]) for positions in all_positions]),
        _row("completions with a box", [Rate.of([p.boxed for p in positions]) for positions in all_positions]),
        _row("truncated completions", [Rate.of([p.truncated for p in positions]) for positions in all_positions]),
        _row("mean length (tokens)", [_mean([p.length for p in positions], ".1f") for positions in all_positions]),
        _row("ceiling (answerable positions)", [Rate.of([p.answerable for p in positions]) for positions in all_positions]),
    ]
    return "\n".join([_row("held-out positions", [stage.name for stage in stages]), _row("---", ["---"] * len(stages)), *rows])


def difficulty_table(stages: Sequence[Stage]) -> str:
    """Reasoning and NTP accuracy at easy / medium / hard positions, two rows a band."""
    rows = []
    for name, threshold in DIFFICULTIES.items():
        bands = [above(stage.results.positions, threshold) for stage in stages]
        rows.append(_row(f"{name} (entropy > {threshold}): reasoning", [Rate.of([p.reasoning_correct for p in band]) for band in bands]))
        rows.append(_row(f"{name}: NTP, same positions", [Rate.of([p.ntp_correct for p in band]) for band in bands]))
    return "\n".join([_row("by difficulty", [stage.name for stage in stages]), _row("---", ["---"] * len(stages)), *rows])


def comparison_lines(stages: Sequence[Stage]) -> list[str]:
    """The last stage against each earlier one, against its own NTP and against its own empty thought, each as a paired bootstrap over documents."""
    last = stages[-1]
    positions = last.results.positions
    lines = [
        _comparison(f"reasoning {last.name} - reasoning {earlier.name}", compare_policies(earlier.results, last.results))
        for earlier in reversed(stages[:-1])
    ]
    controls: dict[str, list[bool | None]] = {
        "NTP": [p.ntp_correct for p in positions],
        "an empty thought": [p.empty_thought_correct for p in positions],
    }
    for name, outcomes in controls.items():
        measured = [outcome for outcome in outcomes if outcome is not None]
        if len(measured) == len(positions):
            against = paired_bootstrap(measured, [p.reasoning_correct for p in positions], units=[p.doc_id for p in positions])
            lines.append(_comparison(f"reasoning {last.name} - {name} of the same weights", against))
    return lines


def _comparison(name: str, difference: Difference) -> str:
    verdict = "above 0" if difference.is_gain else "below 0" if difference.high < 0 else "contains 0"
    return (
        f"- {name}: {100 * difference.difference:+.1f} points, {100 * difference.level:.0f} % interval "
        f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}] {verdict} "
        f"(paired bootstrap over {difference.num_units} documents, {difference.num_positions} positions)"
    )


def _control(outcomes: Sequence[bool | None]) -> Rate | str:
    measured = [outcome for outcome in outcomes if outcome is not None]
    return Rate.of(measured) if measured else "not measured"


def _mean(values: Sequence[float], form: str) -> str:
    return format(float(np.mean(values)), form) if values else "no positions"


def _row(name: str, cells: Sequence[object]) -> str:
    return "| " + " | ".join([name, *map(str, cells)]) + " |"
