"""The paper's bands of difficulty."""

from __future__ import annotations

BANDS: dict[str, float] = {"easy": 0.5, "medium": 1.0, "hard": 1.5}
"""Entropy in nats that a position must exceed to belong to the band; so hard positions are medium and easy ones too, as in the paper."""
