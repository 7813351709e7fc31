"""What is known about a metric: its meaning, and how its values on several ranks become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class Reduction(Enum):
    """How the values of all ranks become the metric's value of the step."""

    SUM = "sum"
    MAX = "maximum"
    MIN = "minimum"
    MEAN_OVER_GROUPS = "mean over groups"  # every rank counts with its number of groups
    SAME = "same on every rank"  # computed from what all ranks know, so there is nothing left to reduce


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric that a run logs.

    The texts are Markdown, for docs/metrics.md. Metrics in one row of a table share them.
    """

    name: str
    meaning: str
    unit: str
    normal: str  # values of a healthy run
    watch_for: str  # values that call for a closer look, and what to do then
    reduction: Reduction


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table in docs/metrics.md."""

    names: tuple[str, ...]  # as the page shows them; BAND stands for every band
    metrics: tuple[Metric, ...]  # at least one; all have the same texts


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of docs/metrics.md: a title and a table, with text around it."""

    title: str
    columns: tuple[str, ...]  # the fields of `Metric` that the table shows beside the names
    rows: tuple[Row, ...]
    before: str = ""
    after: str = ""


def row(
    reductions: Mapping[str, Reduction],
    *,
    meaning: str,
    unit: str = "",
    normal: str = "",
    watch_for: str = "",
    bands: Sequence[str] = (),
) -> Row:
    """Describe metrics that share a row.

    If ``bands`` are given, each name contains ``{band}`` and stands for one metric per band.

    >>> one = row({"{band}/accuracy": Reduction.SAME}, meaning="accuracy", bands=["easy", "hard"])
    >>> one.names, [metric.name for metric in one.metrics]
    (('BAND/accuracy',), ['easy/accuracy', 'hard/accuracy'])
    """
    return Row(
        names=tuple(name.format(band="BAND") for name in reductions),
        metrics=tuple(
            Metric(
                name=name.format(band=band),
                meaning=meaning,
                unit=unit,
                normal=normal,
                watch_for=watch_for,
                reduction=reduction,
            )
            for name, reduction in reductions.items()
            for band in bands or [""]
        ),
    )
