"""How far two computations of the same log-probs differ, and how much of it rounding can explain.

In bf16 the differences have a heavy tail: a healthy run met one token of 1.1 nats among 56 whose mean was
0.01. So a single token proves nothing, however far it is off. Three statistics of many tokens do: the mean,
in which a token counts for no more than ``CAP`` times the limit; the median; and a share of outliers that
chance does not explain for that number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LogprobLimits:
    """Limits in nats. One token in a hundred may lie above ``p99``, and one in a thousand above ``max``."""

    mean: float
    median: float
    p99: float
    max: float

    def times(self, factor: float) -> LogprobLimits:
        return LogprobLimits(
            mean=self.mean * factor, median=self.median * factor, p99=self.p99 * factor, max=self.max * factor
        )


@dataclass(frozen=True, slots=True)
class LogprobDiff:
    """Absolute differences in nats of the compared tokens, ``[N]`` with N > 0.

    A difference that is not finite counts as infinite.
    """

    values: Tensor

    @property
    def num_tokens(self) -> int:
        return self.values.numel()

    @property
    def mean(self) -> float:
        return self.values.mean().item()

    @property
    def median(self) -> float:
        return self.values.median().item()

    @property
    def p99(self) -> float:
        # Not quantile, which refuses more than 16 million elements.
        return self.values.kthvalue(max(1, round(0.99 * self.num_tokens))).values.item()

    @property
    def max(self) -> float:
        return self.values.max().item()

    def num_above(self, nats: float) -> int:
        return int((self.values > nats).sum())

    @property
    def is_finite(self) -> bool:
        return bool(self.values.isfinite().all())


# Baselines (mean / p99 / max), measured with vLLM on CPU and SmolLM2-135M over 400 tokens. fp32 against fp32:
# 7e-6 / 3e-5 / 5e-5. bf16 against bf16 autocast: 0.045 / 0.26 / 0.37. One side bf16, the other fp32:
# 0.03 / 0.18 / 0.25 and 0.04 / 0.19 / 0.35. This noise does not shrink with the size of an update. A stale
# head differed by 0.27 and more.
LOGPROB_LIMITS = {
    torch.float32: LogprobLimits(mean=1e-4, median=8e-5, p99=5e-4, max=1e-3),
    torch.bfloat16: LogprobLimits(mean=0.12, median=0.1, p99=0.8, max=3.0),
}
P99_SHARE, MAX_SHARE = 0.01, 0.001  # share of tokens that may lie above `p99` and `max`
# In the mean a token counts for at most this many times the limit of the mean. Wrong weights, temperatures
# and caches move many tokens.
CAP = 8.0
# Fewer tokens than this are padded with differences of 0. The mean and median of a handful are single tokens.
FEW_TOKENS = 32


def compare_logprobs(rollout_logprobs: Tensor, policy_logprobs: Tensor, mask: Tensor) -> LogprobDiff:
    """``|rollout - policy|`` over the tokens of the mask.

    All arguments are [N, T], and both log-probs are of the tempered distribution.

    Raises:
        ValueError: The mask is empty.
    """
    values = (rollout_logprobs.double() - policy_logprobs.double()).abs()[mask.bool()]
    if values.numel() == 0:
        raise ValueError("no tokens whose log-probs could be compared")
    # NaN (from a broken policy or engine) must not slip through a comparison with a limit.
    return LogprobDiff(values.nan_to_num(nan=torch.inf, posinf=torch.inf))


def logprob_limits(*dtypes: torch.dtype) -> LogprobLimits:
    """The limits of the coarsest of the dtypes."""
    return max((LOGPROB_LIMITS[dtype] for dtype in dtypes), key=lambda limits: limits.max)


def exceeded(diff: LogprobDiff, limits: LogprobLimits) -> list[str]:
    """The limits that are exceeded by more than single tokens can explain, as text.

    Empty if the two computations agree.
    """
    if not diff.is_finite:
        return [f"{int(diff.values.isinf().sum())} of {diff.num_tokens} are not finite"]
    capped = _padded(diff.values.clamp(max=CAP * limits.mean))
    found = [
        f"{name} {value:.2g} > {limit:.2g}"
        for name, value, limit in (
            ("mean", capped.mean().item(), limits.mean),
            ("median", capped.median().item(), limits.median),
        )
        if value > limit
    ]
    for limit, share in ((limits.p99, P99_SHARE), (limits.max, MAX_SHARE)):
        number = diff.num_above(limit)
        if number > max_outliers(diff.num_tokens, share):
            found.append(f"{number} above {limit:.2g}")
    return [f"{', '.join(found)} (of {diff.num_tokens} tokens)"] if found else []


def has_heavy_tail(diff: LogprobDiff, limits: LogprobLimits) -> bool:
    """Whether single tokens are far off. This is worth a look if it is new, but no reason to end a run."""
    return diff.num_above(limits.p99) > P99_SHARE * diff.num_tokens or diff.max > limits.max


def max_outliers(num_tokens: int, share: float) -> float:
    """The largest number of outliers that a true ``share`` explains.

    This is the expected number, plus five standard deviations (Poisson), plus five, since few tokens are far
    from normal. At 1 % it is 9 of 56 tokens and 77 of 4,096 (1.9 %).
    """
    expected = share * num_tokens
    return expected + 5 * math.sqrt(expected) + 5


def _padded(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, max(0, FEW_TOKENS - values.numel())))
