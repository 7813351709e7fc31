"""Put the numbers into words.

A claim is made only if the whole interval of a paired difference lies on one side of 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rpt_lightning.evaluation.paired_bootstrap import Difference, paired_bootstrap
from rpt_lightning.evaluation.report.accuracy import (
    ALL,
    accuracy_point,
    reasoning_minus_empty_thought,
    reasoning_minus_ntp,
)
from rpt_lightning.evaluation.run_reader import Run
from rpt_lightning.evaluation.tables.stages import Rate
from rpt_lightning.records.results import Results, pair_results

Tone = Literal["gain", "loss", "undecided", "unknown"]

MIN_POSITIONS = 100
MIN_DOCUMENTS = 20
"""With fewer, a percentile bootstrap over documents is not reliable, and the report judges nothing."""
_REWARD_STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """One claim and the numbers that support it."""

    tone: Tone
    headline: str
    numbers: str


def points(difference: Difference) -> str:
    """Format a difference with its 95 % interval in percentage points: ``+1.3 points [-0.4, +3.0]``."""
    return (
        f"{100 * difference.difference:+.1f} points "
        f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    )


def verdicts(runs: Sequence[Run]) -> dict[str, list[Statement]]:
    """Make the statements about each run, keyed by its name.

    They cover reasoning against NTP, the thought, the effect of training, and the other runs against the
    first.
    """
    reference = runs[0]
    return {
        run.name: [
            *_of_policy(run),
            *_of_training(run),
            *(_against(reference, run) if run is not reference else []),
        ]
        for run in runs
    }


def _of_policy(run: Run) -> list[Statement]:
    last = run.last_validation
    if last is None and run.answers:
        return [
            Statement(
                tone="unknown",
                headline="This run was asked questions, and this page does not judge those.",
                numbers=(
                    "`rpt compare` shows its accuracy with and without a thought, before and after training."
                ),
            )
        ]
    if last is None:
        return [
            Statement(
                tone="unknown",
                headline="No held-out accuracy: this run was never validated.",
                numbers="Run `rpt validate` on its policy.",
            )
        ]
    point = accuracy_point(last, ALL)
    difference = reasoning_minus_ntp(last)
    if difference is None:
        return [
            Statement(
                tone="unknown",
                headline="Reasoning was not measured, so it cannot be compared with next-token prediction.",
                numbers=f"NTP accuracy at step {last.step}: {point.ntp}.",
            )
        ]
    numbers = (
        f"At step {last.step} by reasoning {point.reasoning}, by NTP {point.ntp} at the same positions"
        f"{_ceiling(last)}."
    )
    statements = [
        _judge(
            difference,
            numbers,
            question="whether reasoning beats next-token prediction",
            gain="Reasoning beats next-token prediction.",
            loss="Reasoning does not beat next-token prediction: it is worse.",
            undecided=(
                "Reasoning is not shown to beat next-token prediction: the interval of the difference "
                "contains 0."
            ),
        )
    ]
    control = reasoning_minus_empty_thought(last)
    if control is not None:
        measured = [position for position in last.positions if position.empty_thought_correct is not None]
        rates = (
            f"With the thought {Rate.of([position.reasoning_correct for position in measured])}, "
            f"with an empty one {Rate.of([position.empty_thought_correct for position in measured])}."
        )
        statements.append(
            _judge(
                control,
                rates,
                question="whether the thought helps",
                gain="After an empty thought, which they were not trained on, the same weights answer worse.",
                loss="The thought harms: after an empty one the same weights answer better.",
                undecided=(
                    "The thought is not shown to help: the interval against an empty thought contains 0."
                ),
            )
        )
    return statements


def _of_training(run: Run) -> list[Statement]:
    statements = []
    measured = [
        results for results in run.validations.values() if accuracy_point(results, ALL).reasoning.count
    ]
    if run.steps and len(measured) < 2:
        statements.append(
            Statement(
                tone="unknown",
                headline="The effect of training is unknown: that needs reasoning accuracy at two steps.",
                numbers=f"Steps logged: {len(run.steps):,}. Validations by reasoning: {len(measured)}.",
            )
        )
    elif len(measured) >= 2:
        first, last = measured[0], measured[-1]
        without = [f"{accuracy_point(results, ALL).ntp} at step {results.step}" for results in (first, last)]
        statements.append(
            _compare(
                first,
                last,
                modes=("reasoning", "reasoning"),
                further=f" Without reasoning, at the same positions: {', '.join(without)}.",
                names=(f"At step {first.step}", f"at step {last.step}"),
                question="whether training raised reasoning accuracy",
                gain=f"From step {first.step} to step {last.step} reasoning accuracy rose.",
                loss=f"From step {first.step} to step {last.step} reasoning accuracy fell.",
                undecided=(
                    f"From step {first.step} to step {last.step} reasoning accuracy is not shown to change: "
                    "the interval contains 0."
                ),
            )
        )
    return statements


def reward_ends(run: Run) -> str:
    """Format the mean reward of the first and last steps, or say that none was logged."""
    _, rewards = run.series("reward/mean")
    if not rewards:
        return "not logged"
    num = min(_REWARD_STEPS, len(rewards))
    return (
        f"{sum(rewards[:num]) / num:.3f} in the first {num} steps, "
        f"{sum(rewards[-num:]) / num:.3f} in the last {num}"
    )


def _against(reference: Run, run: Run) -> list[Statement]:
    """Compare the last policies of two runs.

    Each policy answers in its own way: by reasoning if that was measured, otherwise by NTP. Both are also
    compared without reasoning.
    """
    first, second = reference.last_validation, run.last_validation
    if first is None or second is None:
        return [
            Statement(
                tone="unknown",
                headline=f"No comparison with {reference.name}: one of the two was never validated.",
                numbers="",
            )
        ]
    own = (_mode(first), _mode(second))
    statements = []
    for modes in dict.fromkeys([own, ("ntp", "ntp")]):
        one, other = f"{reference.name} by {_MODE_NAMES[modes[0]]}", f"{run.name} by {_MODE_NAMES[modes[1]]}"
        statements.append(
            _compare(
                first,
                second,
                modes=modes,
                names=(reference.name, run.name),
                question=f"whether {other} is better than {one}",
                gain=f"{other} is more accurate than {one}.",
                loss=f"{other} is less accurate than {one}.",
                undecided=f"{other} is not shown to differ from {one}: the interval contains 0.",
            )
        )
    return statements


_Mode = Literal["reasoning", "ntp"]
_MODE_NAMES = {"reasoning": "reasoning", "ntp": "NTP"}


def _mode(results: Results) -> _Mode:
    return (
        "reasoning"
        if all(position.reasoning_correct is not None for position in results.positions)
        else "ntp"
    )


def _compare(
    first: Results,
    second: Results,
    *,
    modes: tuple[_Mode, _Mode],
    names: tuple[str, str],
    question: str,
    gain: str,
    loss: str,
    undecided: str,
    further: str = "",
) -> Statement:
    try:
        pairs = pair_results(first, second)
    except ValueError as error:
        return Statement(
            tone="unknown",
            headline=f"It is not known {question}: the positions differ.",
            numbers=str(error),
        )
    outcomes = [
        [bool(getattr(pair[side], f"{mode}_correct")) for pair in pairs] for side, mode in enumerate(modes)
    ]  # [2, positions]
    difference = paired_bootstrap(outcomes[0], outcomes[1], units=[one.doc_id for one, _ in pairs])
    rates = [
        f"{name} by {_MODE_NAMES[mode]} {Rate.of(right)}"
        for name, mode, right in zip(names, modes, outcomes, strict=True)
    ]
    return _judge(
        difference,
        f"{', '.join(rates)}.{further}",
        question=question,
        gain=gain,
        loss=loss,
        undecided=undecided,
    )


def _judge(
    difference: Difference, numbers: str, *, question: str, gain: str, loss: str, undecided: str
) -> Statement:
    numbers = (
        f"{numbers} Difference {points(difference)}, "
        f"paired bootstrap over {difference.num_units:,} documents."
    )
    if difference.num_positions < MIN_POSITIONS or difference.num_units < MIN_DOCUMENTS:
        return Statement(
            tone="unknown",
            headline=(
                f"Too few positions to say {question}: {difference.num_positions:,} of "
                f"{difference.num_units:,} documents."
            ),
            numbers=(
                f"{numbers} This report needs at least {MIN_POSITIONS} positions of {MIN_DOCUMENTS} "
                "documents to make a claim."
            ),
        )
    if difference.is_gain:
        return Statement(tone="gain", headline=gain, numbers=numbers)
    if difference.high < 0:
        return Statement(tone="loss", headline=loss, numbers=numbers)
    return Statement(tone="undecided", headline=undecided, numbers=numbers)


def _ceiling(results: Results) -> str:
    unanswerable = sum(not position.answerable for position in results.positions)
    return f"; {unanswerable:,} cannot be answered through the box" if unanswerable else ""
