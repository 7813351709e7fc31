"""The paper's bands of difficulty, and the same ranges without their overlap."""

from __future__ import annotations

from itertools import pairwise

from rpt_lightning.data.manifest import BANDS

__all__ = ["BANDS", "DISJOINT_BANDS"]

DISJOINT_BANDS: dict[str, tuple[float, float]] = dict(
    zip(BANDS, pairwise([*BANDS.values(), float("inf")]), strict=True)
)
"""Above the first entropy and up to the second, which belongs to the band: each position is in one band at most."""
