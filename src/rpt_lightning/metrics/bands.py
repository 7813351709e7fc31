"""The paper's bands of difficulty, and the same ranges without their overlap."""

from __future__ import annotations

from itertools import pairwise

BANDS: dict[str, float] = {"easy": 0.5, "medium": 1.0, "hard": 1.5}
"""Entropy in nats that a position must exceed to belong to the band; so hard positions are medium and easy ones too, as in the paper."""

DISJOINT_BANDS: dict[str, tuple[float, float]] = dict(zip(BANDS, pairwise([*BANDS.values(), float("inf")]), strict=True))
"""Above the first entropy and up to the second, which belongs to the band: each position is in one band at most."""
