"""What single tokens may do and what many may not, for any number of compared tokens."""

from __future__ import annotations

import math

import pytest
import torch

from rpt_lightning.training.engine_check.logprob_diff import (
    LOGPROB_LIMITS,
    LogprobDiff,
    LogprobLimits,
    compare_logprobs,
    exceeded,
    has_heavy_tail,
    logprob_limits,
    max_outliers,
)
from rpt_lightning.training.engine_check.sync_check import SyncError, check_logprobs

BF16, FP32 = LOGPROB_LIMITS[torch.bfloat16], LOGPROB_LIMITS[torch.float32]


def diff(*parts: tuple[int, float]) -> LogprobDiff:
    """Build a difference from pairs of a number of tokens and their difference."""
    return LogprobDiff(
        torch.cat([torch.full((number,), nats, dtype=torch.float64) for number, nats in parts])
    )


def test_logprob_differences_by_hand() -> None:
    rollout = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -0.5, -0.5]])
    policy = torch.tensor([[-1.1, -2.0, 0.0], [-0.5, -0.2, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    found = compare_logprobs(rollout, policy, mask)  # 0.1, 0, 0, 0.3
    assert (found.num_tokens, found.mean, found.p99, found.max) == pytest.approx((4, 0.1, 0.3, 0.3), abs=1e-6)
    assert (found.num_above(0.05), found.num_above(0.2), found.num_above(0.4)) == (2, 1, 0)


def test_p99_leaves_out_the_largest_hundredth() -> None:
    found = diff((10, 1.0), (1, 0.5), (989, 0.0))
    assert (found.p99, found.max, found.median) == (0.5, 1.0, 0.0)
    assert found.mean == pytest.approx(0.0105)


def test_nan_never_passes() -> None:
    found = compare_logprobs(
        torch.tensor([[torch.nan, *[0.0] * 999]]), torch.zeros(1, 1000), torch.ones(1, 1000)
    )
    with pytest.raises(SyncError, match="1 of 1000 are not finite"):
        check_logprobs(found, BF16, version=3)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="no token"):
        compare_logprobs(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))


def test_the_healthy_run_that_was_stopped_goes_on() -> None:
    """Step 39 of a trial in bf16: 56 tokens with a mean of 0.01, except for one rare token."""
    found = diff((55, 0.01), (1, 1.1))
    assert exceeded(found, BF16) == []
    assert has_heavy_tail(found, BF16)
    assert not has_heavy_tail(diff((56, 0.17)), BF16)


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 31, 32, 56, 400, 4096, 30_000, 260_000])
@pytest.mark.parametrize("limits", [BF16, FP32], ids=["bf16", "fp32"])
def test_one_token_ends_nothing_however_far_it_is_off(num_tokens: int, limits: LogprobLimits) -> None:
    assert exceeded(diff((num_tokens - 1, limits.median / 2), (1, 100.0)), limits) == []


@pytest.mark.parametrize("num_tokens", [8, 31, 32, 56, 400, 4096, 30_000])
@pytest.mark.parametrize("limits", [BF16, FP32], ids=["bf16", "fp32"])
def test_tokens_that_are_all_off_end_a_run(num_tokens: int, limits: LogprobLimits) -> None:
    """As another temperature causes it. A handful of tokens must be off by more than rounding ever is."""
    assert "mean" in exceeded(diff((num_tokens, 5 * limits.mean)), limits)[0]


@pytest.mark.parametrize("num_tokens", [56, 75, 400, 4096])
def test_a_cache_that_is_stale_for_some_prompts_ends_a_run(num_tokens: int) -> None:
    """From bf16 with vLLM on a CPU, where half of the prompts met a stale cache.

    The median does not notice it.
    """
    wrong = round(0.2 * num_tokens)
    assert "mean" in exceeded(diff((num_tokens - wrong, 0.009), (wrong, 1.5)), BF16)[0]


def test_outliers_are_counted_as_a_share() -> None:
    """By hand: 1 % plus five standard deviations plus five, of 4,096 tokens 40.96 + 32 + 5.

    Likewise for 0.1 %: 4.1 + 10.1 + 5.
    """
    assert [math.floor(max_outliers(number, 0.01)) for number in (56, 4096, 260_000)] == [9, 77, 2859]
    assert exceeded(diff((4019, 0.01), (77, 0.9)), BF16) == []
    assert exceeded(diff((4018, 0.01), (78, 0.9)), BF16) == ["78 above 0.8 (of 4096 tokens)"]
    assert exceeded(diff((4077, 0.01), (19, 20.0)), BF16) == []
    assert exceeded(diff((4076, 0.01), (20, 20.0)), BF16) == ["20 above 3 (of 4096 tokens)"]
    # A hundredth of very many tokens is a limit, not an exception from one.
    assert exceeded(diff((247_000, 0.01), (13_000, 0.9)), BF16) == ["13000 above 0.8 (of 260000 tokens)"]


def test_the_median_sees_what_moves_every_token() -> None:
    assert exceeded(diff((56, 0.11)), BF16) == ["median 0.11 > 0.1 (of 56 tokens)"]


def test_the_error_names_every_limit_that_is_exceeded() -> None:
    limits = LogprobLimits(mean=0.01, median=0.01, p99=0.1, max=1.0)
    check_logprobs(diff((100, 0.01)), limits, version=3)
    with pytest.raises(
        SyncError, match=r"version 3: .* mean 0.02 > 0.01, median 0.02 > 0.01 \(of 100 tokens\)"
    ) as raised:
        check_logprobs(diff((100, 0.02)), limits, version=3)
    assert raised.value.culprit == "engine"


def test_the_coarser_dtype_sets_the_limits_and_the_tolerance_multiplies_them() -> None:
    assert logprob_limits(torch.float32, torch.float32) == FP32
    for pair in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ):
        assert logprob_limits(*pair) == BF16
    assert BF16.times(2.0) == LogprobLimits(mean=0.24, median=0.2, p99=1.6, max=6.0)
