"""Group-relative advantages: how a completion's reward compares with those of its group.

``r_1 ... r_G`` are the rewards of a task's completions, and ``mean`` is their mean.

- "std": ``(r_i - mean) / (std + eps)``. GRPO, arXiv:2402.03300, section 4.1.2.
- "none": ``r_i - mean``. Dr. GRPO, arXiv:2503.20783.
- "rloo": ``G / (G - 1) (r_i - mean)``, which is ``r_i`` minus the mean of the others. RLOO,
  arXiv:2402.14740.
- "maxrl": ``(r_i - mean) / mean``, and 0 if the mean is 0. For rewards of at least 0. MaxRL,
  arXiv:2602.02710.

For rewards 0 and 1 and a task of success probability p, the expected gradient is that of p itself times a
weight: 1 for "rloo" (exactly) and "none" (times (G - 1) / G), about ``1 / sqrt(p (1 - p))`` for "std", and
``(1 - (1 - p)^(G - 1)) / p`` for "maxrl". The last approaches ``1 / p``, the gradient of log p, as G grows.
Hard tasks then count most.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

AdvantageScale = Literal["std", "none", "rloo", "maxrl"]


def group_advantages(rewards: Tensor, *, scale: AdvantageScale = "std", eps: float = 1e-6) -> Tensor:
    """Group-relative advantages by one of the formulas above, [B, G] -> [B, G].

    The standard deviation is the unbiased one (division by G - 1), as in verl and TRL. The default ``eps`` is
    verl's; TRL adds 1e-4. A group of equal rewards has advantages of exactly 0. The computation runs in fp64
    and the result has the dtype of ``rewards``.

    Raises:
        ValueError: A group has a single completion, so it has no baseline. Or ``scale`` is "maxrl" and a
            reward is negative.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards of shape {list(rewards.shape)}: an advantage needs groups [B, G] of at least "
            "2 completions; raise group_size"
        )
    if scale not in get_args(AdvantageScale):
        raise ValueError(f"scale={scale!r}: choose 'std', 'none', 'rloo' or 'maxrl'")
    exact = rewards.double()  # [B, G]
    if scale == "maxrl" and (exact < 0).any():
        raise ValueError(
            f"model.advantage_scale=maxrl: a completion earned {exact.min().item():g}, but the rewards of a "
            "group are divided by their mean, so they must be at least 0; take "
            "--model.advantage_scale rloo, or a reward that is never negative"
        )
    num = exact.shape[1]
    mean = exact.mean(dim=1, keepdim=True)  # [B, 1]
    advantages = exact - mean  # [B, G]
    if scale == "std":
        advantages = advantages / (exact.std(dim=1, keepdim=True) + eps)
    elif scale == "rloo":
        advantages = advantages * (num / (num - 1))
    elif scale == "maxrl":
        advantages = advantages / mean  # a mean of 0 has equal rewards, see below
    # The mean is rounded, so equal rewards could otherwise leave a tiny advantage.
    is_dead = (exact == exact[:, :1]).all(dim=1, keepdim=True)  # [B, 1]
    return torch.where(is_dead, 0.0, advantages).to(rewards.dtype)
