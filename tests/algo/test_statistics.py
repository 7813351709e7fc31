from __future__ import annotations

import math

import torch

from rpt_lightning.algo.correction import CorrectionStatistics
from rpt_lightning.algo.loss import LossStatistics


def test_sums_add_up_and_the_maximum_is_the_larger_one() -> None:
    left = LossStatistics(
        num_tokens=2.0,
        ratio_sum=3.0,
        ratio_max=1.75,
        clipped_ratio_sum=2.5,
        num_changed_by_clipping=1.0,
        approx_kl_sum=0.5,
    )
    right = LossStatistics(
        num_tokens=6.0,
        ratio_sum=5.0,
        ratio_max=1.25,
        clipped_ratio_sum=5.5,
        num_changed_by_clipping=1.0,
        approx_kl_sum=0.25,
    )
    expected = {
        "loss/ratio_mean": 1.0,
        "loss/ratio_max": 1.75,
        "loss/ratio_after_clip_mean": 1.0,
        "loss/ratio_clipped_frac": 0.25,
        "loss/approx_kl": 0.09375,
    }
    assert (left + right).metrics() == (right + left).metrics() == expected


def test_a_micro_batch_on_a_device_becomes_floats() -> None:
    part = CorrectionStatistics(
        num_tokens=torch.tensor(4.0, dtype=torch.float64),
        raw_sum=torch.tensor(6.0, dtype=torch.float64),
        raw_max=torch.tensor(3.0, dtype=torch.float64),
        weight_sum=torch.tensor(5.0, dtype=torch.float64),
        num_above_cap=torch.tensor(1.0, dtype=torch.float64),
    )
    combined = CorrectionStatistics.combined([part, part])
    assert combined == CorrectionStatistics(
        num_tokens=8.0, raw_sum=12.0, raw_max=3.0, weight_sum=10.0, num_above_cap=2.0
    )
    assert type(combined.raw_max) is float


def test_a_rank_without_tokens_changes_nothing_and_hides_nothing() -> None:
    nothing = CorrectionStatistics.combined([])
    assert set(nothing.metrics().values()) == {0.0}
    broken = CorrectionStatistics(num_tokens=1.0, raw_sum=math.nan, raw_max=math.nan)
    assert math.isnan(CorrectionStatistics.combined([nothing, broken]).metrics()["correction/raw_max"])
