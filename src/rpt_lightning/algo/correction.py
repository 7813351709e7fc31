"""Truncated importance sampling, which corrects for the difference between engine and trainer.

With the same weights, the engine and the trainer compute slightly different log-probs. The weight is a
constant for the gradient.

Sources: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; TRL's
``token_truncate`` and ``token_mask``; verl's token-level ``rollout_is``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rpt_lightning.algo.statistics import Number, Statistics, larger

CorrectionMode = Literal["truncate", "mask"]


@dataclass(frozen=True, kw_only=True)
class CorrectionStatistics(Statistics):
    """Sums and the maximum of the importance weights of some tokens. Raw weights are those before the cap."""

    raw_sum: Number = 0.0
    raw_max: Number = 0.0
    weight_sum: Number = 0.0
    num_above_cap: Number = 0.0  # tokens

    def __add__(self, other: CorrectionStatistics) -> CorrectionStatistics:
        return CorrectionStatistics(
            num_tokens=self.num_tokens + other.num_tokens,
            raw_sum=self.raw_sum + other.raw_sum,
            raw_max=larger(self.raw_max, other.raw_max),
            weight_sum=self.weight_sum + other.weight_sum,
            num_above_cap=self.num_above_cap + other.num_above_cap,
        )

    def metrics(self) -> dict[str, float]:
        """Return what is logged.

        These are the mean and maximum of the raw weights, the mean of the weights that were used, and the
        share of tokens above the cap.
        """
        return {
            "correction/raw_mean": self.per_token(self.raw_sum),
            "correction/raw_max": float(self.raw_max),
            "correction/weight_mean": self.per_token(self.weight_sum),
            "correction/above_cap_frac": self.per_token(self.num_above_cap),
        }


@torch.no_grad()
def truncated_importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    cap: float,
    mode: CorrectionMode = "truncate",
) -> tuple[Tensor, CorrectionStatistics]:
    """Compute ``min(exp(old_logprobs - rollout_logprobs), cap)`` for each token. All tensors are [N, T].

    Args:
        old_logprobs: The trainer's log-probs before the update, in nats, of the tempered distribution.
        rollout_logprobs: The engine's log-probs of the same distribution.
        mask: True for the tokens that count. The weight is 1 where it is False.
        cap: The largest weight.
        mode: "truncate" gives a token above the cap the weight ``cap``, "mask" gives it the weight 0.

    Returns:
        Detached weights, and their statistics, which combine exactly over micro-batches and ranks.

    Raises:
        ValueError: ``cap`` is below 1. It would reduce the weight of tokens on which both sides agree.
    """
    if cap < 1.0:
        raise ValueError(f"cap={cap}: the cap on importance weights must be at least 1; 2 is a usual value")
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode={mode!r}: choose 'truncate' or 'mask'")
    mask = mask.bool()
    raw = (old_logprobs - rollout_logprobs).masked_fill(~mask, 0.0).exp()  # [N, T]
    is_above = raw > cap
    weights = raw.clamp(max=cap) if mode == "truncate" else raw.masked_fill(is_above, 0.0)
    statistics = CorrectionStatistics(
        num_tokens=mask.sum().double(),
        raw_sum=raw[mask].double().sum(),
        raw_max=raw.masked_fill(~mask, 0.0).double().max() if raw.numel() else raw.new_zeros(()).double(),
        weight_sum=weights[mask].double().sum(),
        num_above_cap=(is_above & mask).sum().double(),
    )
    return weights, statistics
