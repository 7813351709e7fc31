"""Group-relative advantages (GRPO, arXiv:2402.03300, section 4.1.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageScale = Literal["std", "none"]


def group_advantages(rewards: Tensor, *, scale: AdvantageScale = "std", eps: float = 1e-6) -> Tensor:
    """Group-relative advantages, ``A = (r - mean_group(r)) / (std_group(r) + eps)``, [B, G] -> [B, G].

    ``scale="none"`` leaves out the division, as Dr. GRPO does (arXiv:2503.20783). The standard deviation is
    the unbiased one (division by G - 1), as in verl and TRL. The default ``eps`` is verl's; TRL adds 1e-4.
    A group of equal rewards has advantages of exactly 0. The computation runs in fp64 and the result has the
    dtype of ``rewards``.

    Raises:
        ValueError: A group has a single completion, so it has no baseline.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"rewards of shape {list(rewards.shape)}: an advantage needs groups [B, G] of at least "
            "2 completions; raise group_size"
        )
    if scale not in ("std", "none"):
        raise ValueError(f"scale={scale!r}: choose 'std' or 'none'")
    exact = rewards.double()  # [B, G]
    advantages = exact - exact.mean(dim=1, keepdim=True)  # [B, G]
    if scale == "std":
        advantages = advantages / (exact.std(dim=1, keepdim=True) + eps)
    # The mean is rounded, so equal rewards could otherwise leave a tiny advantage.
    is_dead = (exact == exact[:, :1]).all(dim=1, keepdim=True)  # [B, 1]
    return torch.where(is_dead, 0.0, advantages).to(rewards.dtype)
