from __future__ import annotations

import math

from rpt_lightning.data.prepare import split_statistics
from rpt_lightning.metrics import difficulty_bands as bands


def test_a_manifest_counts_in_the_bands_of_the_metrics() -> None:
    assert bands.BANDS is split_statistics.BANDS
    apart = {"easy": (0.5, 1.0), "medium": (1.0, 1.5), "hard": (1.5, math.inf)}
    assert apart == bands.DISJOINT_BANDS
