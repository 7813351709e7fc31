"""Accuracy at held-out positions for every band of difficulty, with and without reasoning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rpt_lightning.evaluation.paired_bootstrap import Difference, paired_bootstrap
from rpt_lightning.evaluation.tables.stages import Rate, above
from rpt_lightning.metrics.difficulty_bands import BANDS
from rpt_lightning.records.results import PositionResult, Results

ALL = "all"
THRESHOLDS: dict[str, float] = {ALL: float("-inf"), **BANDS}


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyPoint:
    """The accuracy of one policy in one band.

    Reasoning and NTP use the same weights at the same positions. A reasoning rate with count 0 was not
    measured.
    """

    step: int
    band: str
    reasoning: Rate
    ntp: Rate


def accuracy_point(results: Results, band: str) -> AccuracyPoint:
    """Compute both accuracies of one evaluation.

    Bands are nested as in the paper, so a hard position is also a medium and an easy one.
    """
    positions = above(results.positions, THRESHOLDS[band])
    return AccuracyPoint(
        step=results.step,
        band=band,
        reasoning=Rate.of([position.reasoning_correct for position in positions]),
        ntp=Rate.of([position.ntp_correct for position in positions]),
    )


def accuracy_points(validations: Mapping[int, Results], band: str) -> list[AccuracyPoint]:
    """Compute one point for each validation that has positions in the band."""
    points = [accuracy_point(results, band) for results in validations.values()]
    return [point for point in points if point.ntp.count]


def reasoning_minus_ntp(results: Results, band: str = ALL) -> Difference | None:
    """Compute the paired difference of the same weights at the same positions.

    Returns None if reasoning was not measured there.
    """
    return _paired(above(results.positions, THRESHOLDS[band]), "ntp_correct")


def reasoning_minus_ntp_at(positions: Sequence[PositionResult]) -> Difference | None:
    """Compute the same difference for some positions of one evaluation."""
    return _paired(positions, "ntp_correct")


def reasoning_minus_empty_thought(results: Results) -> Difference | None:
    """Compute the gain from the thought, at the positions where the control was measured.

    The control is the answer of the same weights after an empty thought.
    """
    return _paired(results.positions, "empty_thought_correct")


def _paired(positions: Sequence[PositionResult], without: str) -> Difference | None:
    pairs = [
        (getattr(p, without), p.reasoning_correct, p.doc_id)
        for p in positions
        if None not in (getattr(p, without), p.reasoning_correct)
    ]
    if not pairs:
        return None
    first, second, documents = zip(*pairs, strict=True)
    return paired_bootstrap(first, second, units=documents)
