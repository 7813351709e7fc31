"""Truncated importance sampling, which corrects for the difference between engine and trainer.

With the same weights, the engine and the trainer compute slightly different log-probs. The weight is a
constant for the gradient.

Sources: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; TRL's
``token_truncate`` and ``token_mask``; verl's token-level ``rollout_is``.
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
    """Compute ``min(exp(old_logprobs - rollout_logprobs), cap)`` for each token. All tensors are [N, T].

    Args:
        old_logprobs: The trainer's log-probs before the update, in nats, of the tempered distribution.
        rollout_logprobs: The engine's log-probs of the same distribution.
        mask: True for the tokens that count. The weight is 1 where it is False.
        cap: The largest weight.
        mode: "truncate" gives a token above the cap the weight ``cap``, "mask" gives it the weight 0.

    Returns:
        Detached weights, and statistics for ``correction_metrics``.

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
    metrics = {
        "sum_tokens": mask.sum().double(),
        "sum_raw": raw[mask].double().sum(),
        "max_raw": raw.masked_fill(~mask, 0.0).double().max() if raw.numel() else raw.new_zeros(()).double(),
        "sum_weight": weights[mask].double().sum(),
        "sum_above_cap": (is_above & mask).sum().double(),
    }
    return weights, metrics


def correction_metrics(parts: Sequence[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """Combine the statistics of a step's micro-batches and ranks.

    Returns the mean and maximum of the raw weights, the mean of the weights that were used, and the share of
    tokens above the cap.
    """
    total = add_up(parts)
    num_tokens = max(1.0, total.get("sum_tokens", 0.0))
    return {
        "correction/raw_mean": total.get("sum_raw", 0.0) / num_tokens,
        "correction/raw_max": total.get("max_raw", 0.0),
        "correction/weight_mean": total.get("sum_weight", 0.0) / num_tokens,
        "correction/above_cap_frac": total.get("sum_above_cap", 0.0) / num_tokens,
    }
