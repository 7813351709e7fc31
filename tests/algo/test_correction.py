from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


# Geometric means: (4 * 1 * 1/2)^(1/3) = 2^(1/3), and 3/2 of one token.
GEOMETRIC = 2 ** (1 / 3)


@pytest.mark.parametrize(
    ("options", "expected", "above", "below"),
    [
        ({"mode": "mask", "cap": 2.0, "floor": 0.6}, [[0.0, 1.0, 0.0], [1.5, 1.0, 1.0]], 1, 1),
        ({"mode": "mask", "cap": 4.0, "floor": 0.5}, [[4.0, 1.0, 0.5], [1.5, 1.0, 1.0]], 0, 0),
        ({"level": "sequence", "cap": 1.4}, [[GEOMETRIC] * 3, [1.4, 1.0, 1.0]], 1, 0),
        ({"level": "sequence", "mode": "mask", "cap": 1.4}, [[GEOMETRIC] * 3, [0.0, 1.0, 1.0]], 1, 0),
        ({"level": "sequence", "mode": "mask", "cap": 1.2}, [[0.0] * 3, [0.0, 1.0, 1.0]], 4, 0),
    ],
)
def test_levels_and_floors_by_hand(options, expected, above: int, below: int) -> None:
    ratios = torch.tensor([[4.0, 1.0, 0.5], [1.5, 9.0, 1.0]], dtype=torch.float64)
    if options["cap"] == 4.0:
        options = options | {"cap": 4.0 + 1e-9, "floor": 0.5 - 1e-9}  # exp(log x) is rounded
    weights, statistics = truncated_importance_weights(ratios.log(), torch.zeros(2, 3), MASK, **options)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    metrics = statistics.metrics()
    assert metrics["correction/raw_mean"] == pytest.approx(7.0 / 4)  # of the tokens, whatever the level
    assert metrics["correction/above_cap_frac"] == above / 4
    assert metrics["correction/below_floor_frac"] == below / 4


def test_a_completion_below_the_floor_is_left_out_whole() -> None:
    old = torch.tensor([[0.25, 1.0], [1.0, 1.0]], dtype=torch.float64).log()  # geometric means 1/2 and 1
    mask = torch.ones(2, 2, dtype=torch.bool)
    weights, _ = truncated_importance_weights(
        old, torch.zeros(2, 2), mask, cap=2.0, mode="mask", level="sequence", floor=0.6
    )
    assert weights.tolist() == [[0.0, 0.0], [1.0, 1.0]]


@given(
    st.lists(st.lists(st.floats(-2, 2), min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from(["token", "sequence"]),
)
def test_equal_engines_change_nothing_and_weights_stay_within_their_bounds(rows, level) -> None:
    old = torch.tensor(rows, dtype=torch.float64)
    mask = torch.ones_like(old, dtype=torch.bool)
    same, _ = truncated_importance_weights(old, old, mask, cap=1.0, mode="mask", level=level, floor=1.0)
    assert (same == 1.0).all()
    weights, _ = truncated_importance_weights(
        old, torch.zeros_like(old), mask, cap=1.5, mode="mask", level=level, floor=0.5
    )
    assert ((weights == 0.0) | ((weights >= 0.5) & (weights <= 1.5))).all()
    if level == "sequence":
        assert (weights == weights[:, :1]).all()


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6))
def test_the_level_of_a_single_token_does_not_matter(ratios: list[float]) -> None:
    old = torch.tensor(ratios, dtype=torch.float64)[:, None]
    mask = torch.ones_like(old, dtype=torch.bool)
    by_level = [
        truncated_importance_weights(old, torch.zeros_like(old), mask, cap=1.5, level=level)[0]
        for level in ("token", "sequence")
    ]
    torch.testing.assert_close(*by_level, rtol=0, atol=0)


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


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_garbage_under_the_mask(level) -> None:
    weights, statistics = truncated_importance_weights(
        torch.tensor([[math.nan, 0.0]]),
        torch.zeros(1, 2),
        torch.tensor([[False, True]]),
        cap=2.0,
        level=level,
    )
    assert weights.tolist() == [[1.0, 1.0]]
    assert statistics.metrics()["correction/raw_max"] == 1.0


def test_refused_options() -> None:
    with pytest.raises(ValueError, match=r"cap=0\.5"):
        truncated_importance_weights(OLD, OLD, MASK, cap=0.5)
    with pytest.raises(ValueError, match="'drop'"):
        truncated_importance_weights(OLD, OLD, MASK, cap=2.0, mode="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'word'"):
        truncated_importance_weights(OLD, OLD, MASK, cap=2.0, level="word")  # type: ignore[arg-type]
    for mode, floor in (("truncate", 0.5), ("mask", 1.5), ("mask", 0.0)):
        with pytest.raises(ValueError, match=f"floor={floor}, mode='{mode}'"):
            truncated_importance_weights(OLD, OLD, MASK, cap=2.0, mode=mode, floor=floor)
