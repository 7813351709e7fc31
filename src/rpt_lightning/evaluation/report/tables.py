"""Tables of the report: plain text in rows and columns.

No accuracy stands without its count and its 95 % interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rpt_lightning.evaluation.reasoning_patterns import PATTERNS, relative_change
from rpt_lightning.evaluation.report.accuracy import (
    ALL,
    THRESHOLDS,
    reasoning_minus_ntp,
    reasoning_minus_ntp_at,
)
from rpt_lightning.evaluation.report.verdict import points, reward_ends
from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.evaluation.tables.stages import Rate, above
from rpt_lightning.records.field_groups import field_groups, field_names
from rpt_lightning.records.results import PositionResult

NOT_MEASURED = "not measured"
_ACCURACY_COLUMNS = (
    "positions",
    "by reasoning",
    "by NTP, same positions",
    "difference, 95 % interval",
    "ceiling",
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the report. ``rows[i][0]`` is the name of row ``i``."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


def difficulty_table(run: Run) -> Table | None:
    """Build the table of the last validation, with one row for each band and the paired difference."""
    results = run.last_validation
    if results is None:
        return None
    rows = []
    for band, threshold in THRESHOLDS.items():
        if positions := above(results.positions, threshold):
            rows.append(
                _accuracy_row(
                    "all positions" if band == ALL else f"{band} (entropy > {threshold} nats)", positions
                )
            )
    return Table(
        caption=f"{run.name} at step {results.step}", columns=["difficulty", *_ACCURACY_COLUMNS], rows=rows
    )


def field_tables(run: Run) -> list[Table]:
    """Build a table of the last validation for each field that the corpus knows.

    Each row is a value or a range of values.
    """
    results = run.last_validation
    if results is None:
        return []
    tables = []
    for name in field_names(results.positions):
        groups = field_groups(results.positions, name)
        rows = [_accuracy_row(label, positions) for label, positions in groups]
        having = (
            ""
            if (num := sum(len(positions) for _, positions in groups)) == len(results.positions)
            else f", {num:,} positions that have it"
        )
        tables.append(
            Table(
                caption=f"{run.name} at step {results.step}, by {name}{having}",
                columns=[name, *_ACCURACY_COLUMNS],
                rows=rows,
            )
        )
    return tables


def _accuracy_row(name: str, positions: Sequence[PositionResult]) -> list[str]:
    difference = reasoning_minus_ntp_at(positions)
    answerable = Rate.of([position.answerable for position in positions])
    return [
        name,
        f"{len(positions):,}",
        str(Rate.of([position.reasoning_correct for position in positions])),
        str(Rate.of([position.ntp_correct for position in positions])),
        points(difference) if difference else NOT_MEASURED,
        f"{100 * answerable.mean:.1f} %",
    ]


def run_table(runs: Sequence[Run]) -> Table:
    """Build the table that sets the runs side by side."""
    measures = {
        "policy": _policy,
        "steps logged": lambda run: f"{len(run.steps):,}",
        "mean reward": reward_ends,
        "groups with a gradient": lambda run: _mean_percent(run, "rollout/live_groups_frac"),
        "tokens sampled": lambda run: _total(run, "rollout/tokens"),
        "tokens trained": lambda run: _total(run, "cost/trained_tokens"),
        "time of all steps": _hours,
        "last validation": lambda run: (
            f"step {run.last_validation.step}" if run.last_validation else NOT_MEASURED
        ),
        "accuracy by reasoning": lambda run: _rate(run, "reasoning_correct"),
        "accuracy by NTP": lambda run: _rate(run, "ntp_correct"),
        "reasoning - NTP": _difference,
        "NTP loss": _ntp_loss,
        "with an empty thought": lambda run: _rate(run, "empty_thought_correct"),
        "with a shuffled thought": lambda run: _rate(run, "shuffled_thought_correct"),
        "with filler of equal length": lambda run: _rate(run, "filler_thought_correct"),
        "completions with a box": lambda run: _rate(run, "boxed"),
        "truncated completions": lambda run: _rate(run, "truncated"),
        "completion length": _length,
    }
    rows = [[name, *(measure(run) for run in runs)] for name, measure in measures.items()]
    return Table(caption="Runs side by side", columns=["", *(run.name for run in runs)], rows=rows)


def pattern_tables(patterns: Mapping[str, Mapping[int, Mapping[str, Rate]]]) -> list[Table]:
    """Build the pattern tables.

    Every run with rollouts has a table of its first and last recorded steps. The last steps of the other runs
    are also compared with those of the first run that has rollouts.
    """
    recorded = {name: shares for name, shares in patterns.items() if shares}
    tables = [_pattern_table(name, shares) for name, shares in recorded.items() if len(shares) > 1]
    last = {name: shares[max(shares)] for name, shares in recorded.items()}
    reference = next(iter(last), "")
    return tables + [
        _pattern_comparison(last[reference], last[name], names=(reference, name))
        for name in last
        if name != reference
    ]


def _pattern_table(run_name: str, shares: Mapping[int, Mapping[str, Rate]]) -> Table:
    """Build the table of one run's first and last recorded steps, with the paper's relative change."""
    first_step, last_step = min(shares), max(shares)
    first, last = shares[first_step], shares[last_step]
    rows = []
    for name, keywords in PATTERNS.items():
        rows.append(
            [
                f"{name}: {', '.join(keywords)}",
                str(first[name]),
                str(last[name]),
                _change(first[name], last[name]),
            ]
        )
    return Table(
        caption=run_name,
        columns=["pattern: its keywords", f"step {first_step}", f"step {last_step}", "relative change"],
        rows=rows,
    )


def _pattern_comparison(
    shares: Mapping[str, Rate], other: Mapping[str, Rate], *, names: tuple[str, str]
) -> Table:
    """Build the table of two runs' last recorded steps, side by side."""
    rows = [
        [name, str(shares[name]), str(other[name]), _change(shares[name], other[name])] for name in PATTERNS
    ]
    return Table(
        caption=f"{names[1]} against {names[0]}, last recorded steps",
        columns=["pattern", *names, "relative change"],
        rows=rows,
    )


def _change(before: Rate, after: Rate) -> str:
    change = relative_change(before, after)
    if change is not None:
        return f"{100 * change:+.1f} %"
    return "none in both" if not after.successes else "from none"


def _policy(run: Run) -> str:
    return run.last_validation.policy_path if run.last_validation else "unknown"


def _mean_percent(run: Run, metric: str) -> str:
    _, values = run.series(metric)
    return f"{100 * fmean(values):.0f} % in the mean step" if values else "not logged"


def _total(run: Run, metric: str) -> str:
    _, values = run.series(metric)
    return f"{sum(values):,.0f}" if values else "not logged"


def _hours(run: Run) -> str:
    _, seconds = run.series("time/step_s")
    return f"{sum(seconds) / 3600:.2f} h, {fmean(seconds):.1f} s per step" if seconds else "not logged"


def _rate(run: Run, outcome: str) -> str:
    return (
        str(Rate.of([getattr(position, outcome) for position in run.last_validation.positions]))
        if run.last_validation
        else NOT_MEASURED
    )


def _difference(run: Run) -> str:
    difference = reasoning_minus_ntp(run.last_validation) if run.last_validation else None
    return points(difference) if difference else NOT_MEASURED


def _ntp_loss(run: Run) -> str:
    return (
        f"{-fmean(position.ntp_logprob for position in run.last_validation.positions):.3f} nats"
        if run.last_validation
        else NOT_MEASURED
    )


def _length(run: Run) -> str:
    lengths = (
        [position.length for position in run.last_validation.positions if position.length is not None]
        if run.last_validation
        else []
    )
    return f"{fmean(lengths):.1f} tokens" if lengths else NOT_MEASURED
