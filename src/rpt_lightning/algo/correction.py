"""Truncated importance sampling against the engine: the same weights give the engine and the trainer slightly different log-probs.

Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; TRL's ``token_truncate`` and ``token_mask``, verl's
token-level ``rollout_is``. The weight is a constant for the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from rpt_lightning.algo.statistics import add_up

CorrectionMode = Literal["truncate", "mask"]


@torch.no_grad()
def truncated_importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    cap: float,
    mode: CorrectionMode = "truncate",
) -> tuple[Tensor, dict[str, Tensor]]:
    """``min(exp(old_logprobs - rollout_logprobs), cap)``; ``mode="mask"`` gives tokens above the cap the weight 0 instead. All [N, T]

    ``old_logprobs`` are the trainer's log-probs (nats) before the update, ``rollout_logprobs`` the engine's, both of the tempered distribution.
    Weights are 1 where ``mask`` is False. Returns detached weights and statistics for ``correction_metrics``. Raises ValueError for a cap below 1,
    which would weigh down tokens on which both agree.
    """
    if cap < 1.0:
        raise ValueError(f"cap={cap}: importance weights are capped at 1 or above; 2 is a usual value")
    if mode not in ("truncate", "mask"):
        raise ValueError(f"mode={mode!r}: choose 'truncate' or 'mask'")
    mask = mask.bool()
    raw = (old_logprobs - rollout_logprobs).masked_fill(~mask, 0.0).exp()  # [N, T]
    is_above = raw > cap
    weights = raw.clamp(max=cap) if mode == "truncate" else raw.masked_fill(is_above, 0.0)
    metrics = {
        "sum_tokens": mask.sum().double(),
        "sum_raw": raw[mask].double().sum(),
        "max_raw": raw.masked_fill(~mask, 0.0).double().max() if raw.numel() else raw.new_zeros(()).double(),
        "sum_weight": weights[mask].double().sum(),
        "sum_above_cap": (is_above & mask).sum().double(),
    }
    return weights, metrics


def correction_metrics(parts: Sequence[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """The statistics of a step from those of its micro-batches and ranks: raw weights, the weights that were used, and the share of tokens above the cap."""
    total = add_up(parts)
    num_tokens = max(1.0, total.get("sum_tokens", 0.0))
    return {
        "correction/raw_mean": total.get("sum_raw", 0.0) / num_tokens,
        "correction/raw_max": total.get("max_raw", 0.0),
        "correction/weight_mean": total.get("sum_weight", 0.0) / num_tokens,
        "correction/above_cap_frac": total.get("sum_above_cap", 0.0) / num_tokens,
    }
