from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpt_lightning.algo.entropy import topk_entropy


def test_uniform_tokens_have_the_entropy_of_a_die() -> None:
    torch.testing.assert_close(topk_entropy(torch.zeros(2, 3, 100)), torch.full((2, 3), math.log(16)))


def test_hand_computed_and_renormalised_over_the_top_k() -> None:
    # Probabilities 1/2, 1/4, 1/8, 1/8: the top 2 renormalise to 2/3 and 1/3.
    logits = torch.tensor([0.125, 0.5, 0.25, 0.125], dtype=torch.float64).log()
    assert topk_entropy(logits, k=2).item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2), abs=1e-12)
    assert topk_entropy(logits, k=16).item() == pytest.approx(1.75 * math.log(2), abs=1e-12)


def test_impossible_tokens_add_nothing() -> None:
    assert topk_entropy(torch.tensor([0.0, 0.0, -torch.inf])).item() == pytest.approx(math.log(2))
    assert topk_entropy(torch.tensor([5.0, -torch.inf])).item() == 0.0


@given(st.lists(st.floats(-20, 20), min_size=20, max_size=40), st.floats(-50, 50))
def test_bounded_and_unmoved_by_a_constant(values: list[float], shift: float) -> None:
    logits = torch.tensor(values, dtype=torch.float64)
    entropy = topk_entropy(logits)
    assert -1e-12 <= entropy.item() <= math.log(16) + 1e-12
    assert topk_entropy(logits + shift).item() == pytest.approx(entropy.item(), abs=1e-9)


def test_half_precision_logits_are_computed_in_fp32() -> None:
    logits = torch.linspace(-3, 3, 50).bfloat16()
    assert topk_entropy(logits).dtype == torch.float32
    assert torch.equal(topk_entropy(logits), topk_entropy(logits.float()))


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="k=0"):
        topk_entropy(torch.zeros(4), k=0)
