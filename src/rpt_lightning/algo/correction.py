"""Importance weights that correct for rollouts of a policy other than the one being trained.

With the same weights, the engine and the trainer compute slightly different log-probs. With stale rollouts,
the weights differ too. Let ``rho_t = pi_old(y_t) / pi_engine(y_t)`` for each token of a completion y:

- level "token": the ratio of token t is ``rho_t``;
- level "sequence": the ratio of every token is the geometric mean ``exp(mean_t log rho_t)`` over the
  completion. GSPO (arXiv:2507.18071) takes this ratio of a sequence, between the new policy and the old one.
  verl calls it "geometric".

Then the weight of a token is

- mode "truncate": ``min(ratio, cap)``;
- mode "mask": the ratio if ``floor <= ratio <= cap``, else 0. With a floor this is IcePop (arXiv:2510.18855),
  which takes the level "token", floor 0.5 and cap 5. Without one, only the cap counts.

The weight is a constant for the gradient.

Further sources: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training";
TRL's ``token_truncate`` and ``token_mask``; verl's ``rollout_is`` and ``rollout_rs``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rpt_lightning.algo.statistics import Number, Statistics, larger

CorrectionMode = Literal["truncate", "mask"]
CorrectionLevel = Literal["token", "sequence"]


@dataclass(frozen=True, kw_only=True)
class CorrectionStatistics(Statistics):
    """Sums and the maximum of the importance weights of some tokens. Raw weights are those before the cap."""

    raw_sum: Number = 0.0
    raw_max: Number = 0.0
    weight_sum: Number = 0.0
    num_above_cap: Number = 0.0  # tokens
    num_below_floor: Number = 0.0  # tokens

    def __add__(self, other: CorrectionStatistics) -> CorrectionStatistics:
        return CorrectionStatistics(
            num_tokens=self.num_tokens + other.num_tokens,
            raw_sum=self.raw_sum + other.raw_sum,
            raw_max=larger(self.raw_max, other.raw_max),
            weight_sum=self.weight_sum + other.weight_sum,
            num_above_cap=self.num_above_cap + other.num_above_cap,
            num_below_floor=self.num_below_floor + other.num_below_floor,
        )

    def metrics(self) -> dict[str, float]:
        """Return what is logged.

        These are the mean and maximum of the tokens' raw ratios, the mean of the weights that were used, and
        the shares of tokens whose ratio is above the cap and below the floor.
        """
        return {
            "correction/raw_mean": self.per_token(self.raw_sum),
            "correction/raw_max": float(self.raw_max),
            "correction/weight_mean": self.per_token(self.weight_sum),
            "correction/above_cap_frac": self.per_token(self.num_above_cap),
            "correction/below_floor_frac": self.per_token(self.num_below_floor),
        }


@torch.no_grad()
def truncated_importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    cap: float,
    mode: CorrectionMode = "truncate",
    level: CorrectionLevel = "token",
    floor: float | None = None,
) -> tuple[Tensor, CorrectionStatistics]:
    """Compute the importance weight of each token by the formulas above. All tensors are [N, T].

    Args:
        old_logprobs: The trainer's log-probs before the update, in nats, of the tempered distribution.
        rollout_logprobs: The engine's log-probs of the same distribution.
        mask: True for the tokens that count. The weight is 1 where it is False. A row holds the whole
            completion.
        cap: The largest weight.
        mode: "truncate" gives a ratio above the cap the weight ``cap``, "mask" gives it the weight 0.
        level: Whether each token has its own ratio, or all tokens of a completion their geometric mean.
        floor: "mask" also gives a ratio below it the weight 0. None: no floor.

    Returns:
        Detached weights, and their statistics, which combine exactly over micro-batches and ranks.

    Raises:
        ValueError: ``cap`` is below 1, or ``floor`` above it. Tokens on which both sides agree would then
            lose weight. Or ``floor`` is given for "truncate".
    """
    if cap < 1.0:
        raise ValueError(f"cap={cap}: the cap on importance weights must be at least 1; 2 is a usual value")
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode={mode!r}: choose 'truncate' or 'mask'")
    if level not in ("token", "sequence"):
        raise ValueError(f"level={level!r}: choose 'token' or 'sequence'")
    if floor is not None and (mode != "mask" or not 0.0 < floor <= 1.0):
        raise ValueError(f"floor={floor}, mode={mode!r}: a floor is above 0, at most 1, and only for 'mask'")
    mask = mask.bool()
    log_ratio = (old_logprobs - rollout_logprobs).masked_fill(~mask, 0.0)  # [N, T]
    raw = log_ratio.exp()  # [N, T]
    ratio = raw
    if level == "sequence":
        mean = log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)  # [N, 1]
        ratio = mean.exp().expand_as(raw).masked_fill(~mask, 1.0)  # [N, T]
    is_above = ratio > cap
    is_below = ratio < (0.0 if floor is None else floor)
    weights = ratio.clamp(max=cap) if mode == "truncate" else ratio.masked_fill(is_above | is_below, 0.0)
    statistics = CorrectionStatistics(
        num_tokens=mask.sum().double(),
        raw_sum=raw[mask].double().sum(),
        raw_max=raw.masked_fill(~mask, 0.0).double().max() if raw.numel() else raw.new_zeros(()).double(),
        weight_sum=weights[mask].double().sum(),
        num_above_cap=(is_above & mask).sum().double(),
        num_below_floor=(is_below & mask).sum().double(),
    )
    return weights, statistics
