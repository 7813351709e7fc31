from __future__ import annotations

import math

import pytest
import torch

from rpt_lightning.metrics.accuracy import NextTokenAccuracy
from rpt_lightning.metrics.interval import wilson_interval

# Entropies on and around the thresholds. A band starts above its threshold.
ENTROPY = torch.tensor([0.2, 0.5, 0.7, 1.0, 1.2, 1.5, 1.6, 3.0])
CORRECT = torch.tensor([True, True, True, False, True, False, False, True])
ANSWERABLE = torch.tensor([True, True, False, True, True, True, True, True])


def metric_of(rows: slice) -> NextTokenAccuracy:
    metric = NextTokenAccuracy()
    metric.update(CORRECT[rows], ENTROPY[rows], ANSWERABLE[rows])
    return metric


def test_hand_counted() -> None:
    result = metric_of(slice(None)).compute()
    counts = {"all": (5, 8, 7), "easy": (3, 6, 5), "medium": (2, 4, 4), "hard": (1, 2, 2)}
    for band, (correct, n, answerable) in counts.items():
        assert result[f"{band}/num_positions"] == n
        assert result[f"{band}/num_answerable"] == answerable
        assert result[f"{band}/ceiling"] == answerable / n
        assert result[f"{band}/accuracy"] == correct / n
        assert (result[f"{band}/accuracy_low"], result[f"{band}/accuracy_high"]) == wilson_interval(
            correct, n
        )


def test_batches_and_ranks_add_up() -> None:
    whole = metric_of(slice(None)).compute()
    batches = metric_of(slice(0, 3))
    batches.update(CORRECT[3:], ENTROPY[3:], ANSWERABLE[3:])
    assert batches.compute() == whole
    ranks = metric_of(slice(0, 3))
    ranks.merge_state(metric_of(slice(3, 8)))
    assert ranks.compute() == whole
    # torchmetrics reduces over ranks by a sum, not a mean.
    assert all(reduction.__name__ == "dim_zero_sum" for reduction in ranks._reductions.values())


def test_reset_and_empty() -> None:
    metric = metric_of(slice(None))
    metric.reset()
    metric.update(CORRECT[:1], ENTROPY[:1], ANSWERABLE[:1])
    result = metric.compute()
    assert result["all/accuracy"] == 1.0
    assert math.isnan(result["hard/accuracy"])
    assert math.isnan(result["hard/ceiling"])
    assert (result["hard/accuracy_low"], result["hard/accuracy_high"], result["hard/num_positions"]) == (
        0.0,
        1.0,
        0.0,
    )


def test_rows_must_belong_together() -> None:
    with pytest.raises(AssertionError):
        NextTokenAccuracy().update(CORRECT[:2], ENTROPY, ANSWERABLE)
