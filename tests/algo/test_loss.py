from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpt_lightning.algo.loss import LossStatistics, policy_loss

GOLDENS = Path(__file__).parent / "goldens"
TRL, VERL = (json.loads((GOLDENS / f"{name}.json").read_text()) for name in ("trl", "verl"))
AGGREGATIONS = ("token_mean", "sequence_mean", "constant")


def as_tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_and_gradient(inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, LossStatistics]:
    logprobs = inputs["logprobs"].clone().requires_grad_()
    options = {"clip_low": 0.2, "clip_high": 0.2} | options
    loss, statistics = policy_loss(
        logprobs, inputs["old_logprobs"], inputs["advantages"], inputs["mask"], **options
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), gradient, statistics


def check_golden(case: dict[str, Any], inputs: dict[str, Any], **options: Any) -> LossStatistics:
    loss, gradient, statistics = loss_and_gradient(
        {name: as_tensor(values) for name, values in inputs.items()},
        clip_low=case["clip"][0],
        clip_high=case["clip"][1],
        correction=None if case["correction"] is None else as_tensor(case["correction"]),
        **options,
    )
    # verl adds 1e-8 to lengths. All other arithmetic is the same, in fp64.
    assert loss.item() == pytest.approx(case["loss"], abs=2e-8)
    torch.testing.assert_close(gradient, as_tensor(case["gradient"]), rtol=0, atol=2e-8)
    assert gradient.abs().max() > 1e-3
    return statistics


@pytest.mark.parametrize("case", TRL["losses"], ids=lambda case: case["name"])
def test_parity_with_trl(case: dict[str, Any]) -> None:
    inputs = TRL["inputs"][case["inputs"]]
    aggregation = {"dapo": "token_mean", "grpo": "sequence_mean", "dr_grpo": "constant"}[case["loss_type"]]
    normalizer = len(inputs["mask"]) * TRL["max_tokens"] if aggregation == "constant" else None
    check_golden(case, inputs, aggregation=aggregation, normalizer=normalizer)


@pytest.mark.parametrize("case", VERL["losses"], ids=lambda case: case["name"])
def test_parity_with_verl(case: dict[str, Any]) -> None:
    inputs = VERL["inputs"][case["inputs"]]
    aggregation = {
        "token-mean": "token_mean",
        "seq-mean-token-mean": "sequence_mean",
        "seq-mean-token-sum-norm": "constant",
    }[case["mode"]]
    # verl counts the sequences that have a token, and multiplies by the padded length.
    constant = sum(any(row) for row in inputs["mask"]) * len(inputs["mask"][0])
    statistics = check_golden(
        case, inputs, aggregation=aggregation, normalizer=constant if aggregation == "constant" else None
    )
    assert statistics.metrics()["loss/ratio_clipped_frac"] == pytest.approx(case["clipped_frac"], abs=1e-6)


# Two sequences of one and two tokens, with ratios 2, 1/2 and 1.
RATIOS = as_tensor([[2.0, 7.0], [0.5, 1.0]])
BY_HAND = {
    "logprobs": RATIOS.log() - 1.0,
    "old_logprobs": torch.full((2, 2), -1.0, dtype=torch.float64),
    "advantages": as_tensor([3.0, -1.0]),
    "mask": torch.tensor([[True, False], [True, True]]),
}


@pytest.mark.parametrize(
    ("aggregation", "normalizer", "expected"),
    [
        # Token losses: -min(2, 1.2) 3 = -3.6; -min(-0.5, -0.8) = 0.8; 1.
        ("token_mean", None, (-3.6 + 0.8 + 1.0) / 3),
        ("token_mean", 6, (-3.6 + 0.8 + 1.0) / 6),
        ("sequence_mean", None, (-3.6 + (0.8 + 1.0) / 2) / 2),
        ("constant", 10, (-3.6 + 0.8 + 1.0) / 10),
    ],
)
def test_hand_computed_loss(aggregation: str, normalizer: float | None, expected: float) -> None:
    loss, gradient, statistics = loss_and_gradient(BY_HAND, aggregation=aggregation, normalizer=normalizer)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    # Both tokens outside the trust region have no gradient. The token with ratio 1 and advantage -1 pushes
    # its log-prob down.
    assert gradient[0].tolist() == [0.0, 0.0]
    assert gradient[1, 0].item() == 0.0
    assert gradient[1, 1].item() > 0.0
    combined = LossStatistics.combined([statistics]).metrics()
    assert combined["loss/ratio_mean"] == pytest.approx(3.5 / 3)
    assert combined["loss/ratio_max"] == pytest.approx(2.0)
    assert combined["loss/ratio_after_clip_mean"] == pytest.approx((1.2 + 0.8 + 1.0) / 3)
    assert combined["loss/ratio_clipped_frac"] == pytest.approx(2 / 3)
    assert combined["loss/approx_kl"] == pytest.approx((1 - math.log(2) + -0.5 + math.log(2)) / 3)


def test_on_policy_gradient_is_the_advantage() -> None:
    inputs = BY_HAND | {"old_logprobs": BY_HAND["logprobs"]}
    _, gradient, _ = loss_and_gradient(inputs, aggregation="token_mean")
    torch.testing.assert_close(gradient, as_tensor([[-1.0, 0.0], [1 / 3, 1 / 3]]))


def test_correction_multiplies_and_is_a_constant() -> None:
    inputs = BY_HAND | {"old_logprobs": BY_HAND["logprobs"]}
    correction = as_tensor([[2.0, 5.0], [0.5, 1.0]]).requires_grad_()
    loss, gradient, _ = loss_and_gradient(inputs, aggregation="token_mean", correction=correction)
    assert loss.item() == pytest.approx((-6.0 + 0.5 + 1.0) / 3)
    torch.testing.assert_close(gradient, as_tensor([[-2.0, 0.0], [1 / 6, 1 / 3]]))
    logprobs = inputs["logprobs"].clone().requires_grad_()
    policy_loss(
        logprobs,
        inputs["old_logprobs"],
        inputs["advantages"],
        inputs["mask"],
        clip_low=0.2,
        clip_high=0.2,
        aggregation="token_mean",
        correction=correction,
    )[0].backward()
    assert logprobs.grad is not None
    assert correction.grad is None


def test_gradient_against_finite_differences() -> None:
    torch.manual_seed(0)
    old, advantages = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    mask = torch.rand(3, 4) > 0.3
    # Ratios stay away from the points where clipping starts.
    logprobs = (old + 0.1 * torch.rand(3, 4, dtype=torch.float64)).requires_grad_()
    for aggregation in AGGREGATIONS:

        def loss_of(x: Tensor, aggregation: Any = aggregation) -> Tensor:
            return policy_loss(
                x, old, advantages, mask, clip_low=0.3, clip_high=0.3, aggregation=aggregation, normalizer=5.0
            )[0]

        assert torch.autograd.gradcheck(loss_of, (logprobs,))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_what_is_under_the_mask_never_counts(garbage: float, aggregation: str) -> None:
    clean = loss_and_gradient(BY_HAND, aggregation=aggregation, normalizer=3)
    dirty = {name: values.clone() for name, values in BY_HAND.items()}
    for name in ("logprobs", "old_logprobs"):
        dirty[name][0, 1] = garbage
    correction = torch.ones(2, 2, dtype=torch.float64)
    correction[0, 1] = garbage
    loss, gradient, statistics = loss_and_gradient(
        dirty, aggregation=aggregation, normalizer=3, correction=correction
    )
    assert loss == clean[0]
    assert torch.equal(gradient, clean[1])
    assert statistics == clean[2]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(AGGREGATIONS),
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
    st.booleans(),
)
def test_micro_batches_add_up(seed: int, aggregation: str, parts: list[int], corrected: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "old_logprobs": normal(8, 5),
        "advantages": normal(8),
        "mask": torch.rand(8, 5, generator=generator) > 0.4,
    }
    inputs["logprobs"] = inputs["old_logprobs"] + 0.3 * normal(8, 5)
    correction = normal(8, 5).exp() if corrected else None
    normalizer = 1.0 + float(inputs["mask"].sum())
    options: dict[str, Any] = {"aggregation": aggregation, "normalizer": normalizer}
    loss, gradient, statistics = loss_and_gradient(inputs, **options, correction=correction)
    sums: list[LossStatistics] = []
    total, pieces = 0.0, torch.zeros_like(gradient)
    for part in range(4):
        # May be empty, like a rank without sequences.
        rows = [row for row, owner in enumerate(parts) if owner == part]
        piece = loss_and_gradient(
            {k: v[rows] for k, v in inputs.items()},
            **options,
            correction=None if correction is None else correction[rows],
        )
        total += piece[0].item()
        pieces[rows] = piece[1]
        sums.append(piece[2])
    assert total == pytest.approx(loss.item(), abs=1e-12)
    torch.testing.assert_close(pieces, gradient, rtol=0, atol=1e-12)
    assert LossStatistics.combined(sums).metrics() == pytest.approx(statistics.metrics())


def test_no_token_at_all_is_zero_and_finite() -> None:
    inputs = BY_HAND | {"mask": torch.zeros(2, 2, dtype=torch.bool)}
    for aggregation in AGGREGATIONS:
        loss, gradient, _ = loss_and_gradient(
            inputs, aggregation=aggregation, normalizer=1 if aggregation == "constant" else None
        )
        assert loss.item() == 0.0
        assert not gradient.any()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"aggregation": "constant"}, "normalizer"),
        ({"aggregation": "mean"}, "'mean'"),
        ({"aggregation": "token_mean", "normalizer": 0}, "normalizer=0"),
    ],
)
def test_refused_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        loss_and_gradient(BY_HAND, **options)
