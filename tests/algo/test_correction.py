from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rpt_lightning.algo.correction import CorrectionStatistics, truncated_importance_weights

VERL = json.loads((Path(__file__).parent / "goldens/verl.json").read_text())
OLD = torch.tensor([[4.0, 1.0, 0.5], [1.5, 9.0, 1.0]]).log()
MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("truncate", [[2.0, 1.0, 0.5], [1.5, 1.0, 1.0]]), ("mask", [[0.0, 1.0, 0.5], [1.5, 1.0, 1.0]])],
)
def test_hand_computed(mode, expected: list[list[float]]) -> None:
    weights, statistics = truncated_importance_weights(OLD, torch.zeros(2, 3), MASK, cap=2.0, mode=mode)
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert not weights.requires_grad
    metrics = CorrectionStatistics.combined([statistics]).metrics()
    assert metrics["correction/raw_mean"] == pytest.approx(7.0 / 4)
    assert metrics["correction/raw_max"] == pytest.approx(4.0)
    assert metrics["correction/weight_mean"] == pytest.approx((5.0 if mode == "truncate" else 3.0) / 4)
    assert metrics["correction/above_cap_frac"] == pytest.approx(1 / 4)


def test_statistics_of_micro_batches_combine_exactly() -> None:
    whole = truncated_importance_weights(OLD, torch.zeros(2, 3), MASK, cap=1.2)[1]
    parts = [
        truncated_importance_weights(OLD[rows], torch.zeros(1, 3), MASK[rows], cap=1.2)[1]
        for rows in ([0], [1])
    ]
    assert CorrectionStatistics.combined(parts).metrics() == pytest.approx(whole.metrics())


def test_parity_with_verl() -> None:
    case = next(case for case in VERL["losses"] if case["correction"] is not None)
    inputs = {
        name: torch.tensor(values, dtype=torch.float64)
        for name, values in VERL["inputs"][case["inputs"]].items()
    }
    weights, _ = truncated_importance_weights(
        inputs["old_logprobs"], inputs["rollout_logprobs"], inputs["mask"], cap=case["cap"]
    )
    # verl sets the weights of padding to 0. The loss masks padding anyway.
    torch.testing.assert_close(
        weights * inputs["mask"], torch.tensor(case["correction"], dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert (weights == case["cap"]).any()


def test_garbage_under_the_mask() -> None:
    weights, statistics = truncated_importance_weights(
        torch.tensor([[math.nan, 0.0]]), torch.zeros(1, 2), torch.tensor([[False, True]]), cap=2.0
    )
    assert weights.tolist() == [[1.0, 1.0]]
    assert statistics.metrics()["correction/raw_max"] == 1.0


def test_refused_options() -> None:
    with pytest.raises(ValueError, match=r"cap=0\.5"):
        truncated_importance_weights(OLD, OLD, MASK, cap=0.5)
    with pytest.raises(ValueError, match="'drop'"):
        truncated_importance_weights(OLD, OLD, MASK, cap=2.0, mode="drop")  # type: ignore[arg-type]
