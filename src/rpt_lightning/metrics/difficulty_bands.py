"""The paper's bands of difficulty, and the same ranges without their overlap."""

from __future__ import annotations

from itertools import pairwise

from rpt_lightning.data.prepare.split_statistics import BANDS

__all__ = ["BANDS", "DISJOINT_BANDS"]

DISJOINT_BANDS: dict[str, tuple[float, float]] = dict(
    zip(BANDS, pairwise([*BANDS.values(), float("inf")]), strict=True)
)
"""Each band's entropy range, without the lower bound and with the upper one. A position is in at most one."""
