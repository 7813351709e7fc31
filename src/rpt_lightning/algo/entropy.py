"""Entropy over the most likely tokens, by which RPT selects the positions to train on (section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_entropy(logits: Tensor, k: int = 16) -> Tensor:
    """Entropy in nats of the ``k`` most likely tokens, renormalised to sum to 1, [..., V] -> [...].

    The paper names the 16 most likely tokens. It does not mention renormalisation or the base of the
    logarithm, so both are this project's choice. If the vocabulary is smaller than ``k``, all of it is used.
    The computation runs in fp32 or better.
    """
    if k < 1:
        raise ValueError(f"k={k}: the entropy needs at least one token")
    top = logits.topk(min(k, logits.shape[-1]), dim=-1).values  # [..., K]
    logprobs = torch.log_softmax(top if top.dtype == torch.float64 else top.float(), dim=-1)
    # A logit of -inf is a token of probability 0, and 0 * log 0 = 0.
    return -torch.where(logprobs.isneginf(), 0.0, logprobs.exp() * logprobs).sum(dim=-1)  # [...]
