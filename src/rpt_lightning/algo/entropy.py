"""Entropy over the most likely tokens: the measure by which RPT chooses what is worth predicting (section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_entropy(logits: Tensor, k: int = 16) -> Tensor:
    """Entropy in nats of the ``k`` most likely tokens, renormalised to sum to 1. [..., V] -> [...]

    The paper names the 16 most likely tokens and neither renormalisation nor the base of the logarithm: both are this project's choice. A vocabulary
    smaller than ``k`` is taken whole. Computed in fp32 at least.
    """
    if k < 1:
        raise ValueError(f"k={k}: the entropy needs at least one token")
    top = logits.topk(min(k, logits.shape[-1]), dim=-1).values  # [..., K]
    logprobs = torch.log_softmax(top if top.dtype == torch.float64 else top.float(), dim=-1)
    # A logit of -inf is a token that cannot come: 0 * log 0 = 0.
    return -torch.where(logprobs.isneginf(), 0.0, logprobs.exp() * logprobs).sum(dim=-1)  # [...]
