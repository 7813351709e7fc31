"""Markdown tables that show where a policy is right and how much an answer costs.

They split the positions by disjoint difficulty, kind of token and length of thought. They also cover
sampled answers and FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rpt_lightning.evaluation.paired_bootstrap import paired_bootstrap
from rpt_lightning.evaluation.tables.stages import (
    Rate,
    Stage,
    accuracy_rows,
    comparison_line,
    markdown_row,
    markdown_table,
    mean_text,
)
from rpt_lightning.metrics.difficulty_bands import DISJOINT_BANDS
from rpt_lightning.metrics.interval import wilson_interval
from rpt_lightning.metrics.pass_at_k import pass_at_k
from rpt_lightning.metrics.token_kind import TOKEN_KINDS
from rpt_lightning.policy.flops import Work, add_works, forward_flops, prompt_work, sampling_work
from rpt_lightning.records.results import PositionResult, Results, pair_results

NOT_MEASURED = "not measured"
NUM_LENGTH_BINS = 4
SAMPLING_NOTE = (
    "If no sample counts as right, or if every one does, the interval is Wilson's for that many documents."
)
COST_NOTE = (
    "FLOPs of an answer are 2 x parameters for each token, plus attention's products. Reasoning processes "
    "the prompt and the completion, NTP the context. Each position is counted alone: a prefix that several "
    "positions or samples share is counted for each."
)


def disjoint_table(stages: Sequence[Stage]) -> str:
    """Build a table like `difficulty_table`, but with each position in one band only."""
    rows = []
    for name, (low, high) in DISJOINT_BANDS.items():
        meaning = f"entropy {low} to {high}" if np.isfinite(high) else f"entropy > {low}"
        rows += accuracy_rows(
            f"{name} only",
            meaning,
            [[p for p in stage.results.positions if low < p.entropy <= high] for stage in stages],
        )
    return markdown_table("by difficulty, without overlap", _names(stages), rows)


def kind_table(stages: Sequence[Stage]) -> str:
    """Build the table by kind of the true token (metrics/token_kind.py), without kinds that do not occur."""
    rows = []
    for kind in TOKEN_KINDS:
        selections = [[p for p in stage.results.positions if p.token_kind == kind] for stage in stages]
        if any(selections):
            rows += accuracy_rows(kind, "true token", selections)
    return markdown_table("by kind of token", _names(stages), rows)


def length_table(stage: Stage) -> str | None:
    """Build the table by length of the greedy thought, in bins of about equal size.

    Equal lengths share a bin, so there may be fewer bins. Bins hold different positions, so compare
    reasoning with NTP within a bin. Returns None if no thought was measured.
    """
    ended = [p for p in stage.results.positions if p.thought_length is not None]
    if not ended:
        return None
    lengths = np.array([p.thought_length for p in ended])
    # "lower" picks lengths that occur, so a bin is named by lengths of its own thoughts.
    edges = np.unique(np.quantile(lengths, np.arange(1, NUM_LENGTH_BINS) / NUM_LENGTH_BINS, method="lower"))
    bins = np.searchsorted(edges, lengths)  # a bin includes its upper edge
    rows = []
    for number in np.unique(bins):
        inside = [p for p, own in zip(ended, bins, strict=True) if own == number]
        low, high = lengths[bins == number].min(), lengths[bins == number].max()
        rows.append(_length_row(f"{low} tokens" if low == high else f"{low} to {high} tokens", inside))
    rows.append(
        _length_row(
            "no end of thought",
            [p for p in stage.results.positions if p.thought_length is None and p.length is not None],
        )
    )
    return markdown_table(f"{stage.name}, by length of thought", ["reasoning", "NTP, same positions"], rows)


def sampling_table(stages: Sequence[Stage]) -> str | None:
    """Build the table of avg@n and the unbiased pass@k for the powers of two up to n.

    Intervals resample documents. Returns None if nothing was sampled.
    """
    num_samples = max(
        (n for stage in stages if (n := samples_a_position(stage.results)) is not None), default=0
    )
    if not num_samples:
        return None
    rows = [
        markdown_row(
            "temperature; samples per position", [_sampling_settings(stage.results) for stage in stages]
        )
    ]
    rows.append(
        markdown_row(
            "avg@n", [_interval_text(stage.results, avg_outcomes(stage.results)) for stage in stages]
        )
    )
    for k in [2**power for power in range(num_samples.bit_length())]:
        rows.append(
            markdown_row(
                f"pass@{k}",
                [_interval_text(stage.results, _pass_outcomes(stage.results, k)) for stage in stages],
            )
        )
    return (
        f"{markdown_table('sampled answers, intervals over documents', _names(stages), rows)}\n\n"
        f"{SAMPLING_NOTE}"
    )


def cost_table(stages: Sequence[Stage]) -> str:
    """Build the table of the cost of one greedy answer, by reasoning and by NTP (COST_NOTE).

    It also shows the mean length of a sampled answer.
    """
    positions = [stage.results.positions for stage in stages]
    reasoning = [
        _answer_flops(
            stage.results, [_answer_work(p.prompt_tokens, p.length) for p in stage.results.positions]
        )
        for stage in stages
    ]
    ntp = [
        _answer_flops(stage.results, [_answer_work(p.context_tokens, 1) for p in stage.results.positions])
        for stage in stages
    ]
    ratios = [
        None if one is None or other is None else one / other
        for one, other in zip(reasoning, ntp, strict=True)
    ]
    rows = [
        markdown_row(
            "prompt (tokens)", [mean_text([p.prompt_tokens for p in rows], ".1f") for rows in positions]
        ),
        markdown_row(
            "completion (tokens)", [mean_text([p.length for p in rows], ".1f") for rows in positions]
        ),
        markdown_row(
            "a sampled answer (tokens)",
            [mean_text([_sample_length(p) for p in rows], ".1f") for rows in positions],
        ),
        markdown_row(
            "context alone, for NTP (tokens)",
            [mean_text([p.context_tokens for p in rows], ".1f") for rows in positions],
        ),
        markdown_row("FLOPs by reasoning", [_number(flops, ".3g") for flops in reasoning]),
        markdown_row("FLOPs by NTP", [_number(flops, ".3g") for flops in ntp]),
        markdown_row("reasoning / NTP", [_number(ratio, ".2f") for ratio in ratios]),
    ]
    return markdown_table("cost of an answer, mean", _names(stages), rows)


def further_comparisons(stages: Sequence[Stage]) -> list[str]:
    """Compare the last stage with each earlier one by NTP and, if possible, by sampled answers.

    Sampled answers are compared if both stages drew equally many at the same temperature.
    """
    lines = []
    last = stages[-1]
    for earlier in reversed(stages[:-1]):
        pairs = pair_results(earlier.results, last.results)
        units = [one.doc_id for one, _ in pairs]
        ntp = paired_bootstrap(
            [one.ntp_correct for one, _ in pairs], [other.ntp_correct for _, other in pairs], units=units
        )
        lines.append(comparison_line(f"NTP {last.name} - NTP {earlier.name}", ntp))
        first, second = (avg_outcomes(stage.results) for stage in (earlier, last))
        if first and second and _sampling_settings(earlier.results) == _sampling_settings(last.results):
            by_task = dict(zip([p.task_id for p in last.results.positions], second, strict=True))
            difference = paired_bootstrap(first, [by_task[one.task_id] for one, _ in pairs], units=units)
            lines.append(
                comparison_line(
                    f"avg@{samples_a_position(last.results)} {last.name} - {earlier.name}", difference
                )
            )
    return lines


def samples_a_position(results: Results) -> int | None:
    """Return how many answers were sampled at each position.

    Returns None if there were none, or if the number differs between positions.
    """
    numbers = {p.num_samples for p in results.positions}
    return numbers.pop() if len(numbers) == 1 else None


def avg_outcomes(results: Results) -> list[float]:
    """Return the share of right samples at each position, or an empty list if nothing was sampled."""
    num_samples = samples_a_position(results)
    return [(p.num_correct or 0) / num_samples for p in results.positions] if num_samples else []


def _pass_outcomes(results: Results, k: int) -> list[float]:
    num_samples = samples_a_position(results)
    return (
        [pass_at_k(num_samples, p.num_correct or 0, k) for p in results.positions]
        if num_samples and k <= num_samples
        else []
    )


def _interval_text(results: Results, outcomes: Sequence[float]) -> str:
    if not outcomes:
        return NOT_MEASURED
    mean = paired_bootstrap([0.0] * len(outcomes), outcomes, units=[p.doc_id for p in results.positions])
    low, high = mean.low, mean.high
    if mean.second in (0.0, 1.0):  # all resamples are equal, which would claim certainty
        low, high = wilson_interval(int(mean.second) * mean.num_units, mean.num_units)
    return f"{100 * mean.second:.1f} % [{100 * low:.1f}, {100 * high:.1f}] at {mean.num_positions} positions"


def _sampling_settings(results: Results) -> str:
    num_samples = samples_a_position(results)
    return f"{results.temperature}; {num_samples}" if num_samples else NOT_MEASURED


def _answer_flops(results: Results, works: Sequence[Work | None]) -> float | None:
    """Mean FLOPs over the positions where they were measured."""
    measured = [work for work in works if work is not None]
    return (
        forward_flops(results.model_size, add_works(measured)) / len(measured)
        if measured and results.model_size is not None
        else None
    )


def _answer_work(read_tokens: int | None, sampled_tokens: int | None) -> Work | None:
    return (
        None
        if read_tokens is None or sampled_tokens is None
        else prompt_work(read_tokens) + sampling_work(read_tokens, sampled_tokens)
    )


def _sample_length(position: PositionResult) -> float | None:
    """Mean number of tokens over a position's samples."""
    return (
        position.sampled_tokens / position.num_samples
        if position.sampled_tokens is not None and position.num_samples
        else None
    )


def _number(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else format(value, form)


def _length_row(name: str, positions: Sequence[PositionResult]) -> str:
    return markdown_row(
        name, [Rate.of([p.reasoning_correct for p in positions]), Rate.of([p.ntp_correct for p in positions])]
    )


def _names(stages: Sequence[Stage]) -> list[str]:
    return [stage.name for stage in stages]
