"""The clipped policy-gradient loss of GRPO (arXiv:2402.03300, equation 3).

Choices that RPT leaves open are parameters. The KL and entropy coefficients are 0 in RPT's runs, so neither
term is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from rpt_lightning.algo.statistics import add_up

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    aggregation: Aggregation,
    normalizer: float | None = None,
    correction: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum ``-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)`` over the tokens and divide the sum.

    The ratio is ``exp(logprobs - old_logprobs)``. ``logprobs``, ``old_logprobs``, ``mask`` (True = the token
    counts) and the detached weights ``correction`` are [N, T]. ``advantages`` is [N]. Masked entries may hold
    anything, even NaN. With ``l`` for the loss of a token, ``aggregation`` is one of

    - ``token_mean`` (DAPO): ``sum l / normalizer``, where the normalizer is the step's number of tokens;
    - ``sequence_mean`` (GRPO): ``sum_i (sum_t l / length_i) / normalizer``, where the normalizer is the
      step's number of sequences;
    - ``constant`` (Dr. GRPO): ``sum l / normalizer``, where the normalizer is a constant, such as the number
      of sequences times the longest allowed completion.

    If ``normalizer`` is given for the whole step, the losses (and gradients) of its micro-batches and ranks
    *add up* to those of the step. If it is None, the function counts the tokens in its own tensors, or the
    sequences with at least one token. ``constant`` has no such default.

    Returns the loss and its statistics. Those named ``sum_`` add up exactly over micro-batches and ranks, and
    those named ``max_`` combine by their maximum. See ``step_metrics``.
    """
    if aggregation not in ("token_mean", "sequence_mean", "constant"):
        raise ValueError(f"aggregation={aggregation!r}: choose token_mean, sequence_mean or constant")
    if aggregation == "constant" and normalizer is None:
        raise ValueError(
            "aggregation='constant' divides by a constant: set normalizer, such as sequences x max_tokens"
        )
    if normalizer is not None and normalizer <= 0:
        raise ValueError(f"normalizer={normalizer}: it must be positive; a step without tokens has no loss")
    mask = mask.bool()
    # Mask before exp, so that neither values nor gradients under the mask can become NaN.
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)  # [N, T]
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    unclipped_loss = -ratio * advantages[:, None]
    clipped_loss = -clipped_ratio * advantages[:, None]
    token_loss = torch.maximum(unclipped_loss, clipped_loss)  # [N, T]
    if correction is not None:
        token_loss = token_loss * correction.detach()
    token_loss = token_loss.masked_fill(~mask, 0.0)

    lengths = mask.sum(dim=1)  # [N]
    if aggregation == "sequence_mean":
        total = (token_loss.sum(dim=1) / lengths.clamp(min=1)).sum()
        count = (lengths > 0).sum()
    else:
        total = token_loss.sum()
        count = lengths.sum()
    loss = total / (count.clamp(min=1) if normalizer is None else normalizer)

    with torch.no_grad():
        metrics = {
            "sum_tokens": mask.sum().double(),
            "sum_ratio": ratio[mask].double().sum(),
            "max_ratio": ratio.masked_fill(~mask, 0.0).double().max()
            if ratio.numel()
            else ratio.new_zeros(()).double(),
            "sum_ratio_after_clip": clipped_ratio[mask].double().sum(),
            "sum_ratio_clipped": (clipped_loss > unclipped_loss)[mask].double().sum(),
            # k3 of http://joschu.net/blog/kl-approx.html, a non-negative estimate of KL(old || new).
            "sum_approx_kl": (ratio - 1.0 - log_ratio)[mask].double().sum(),
        }
    return loss, metrics


def step_metrics(parts: Sequence[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """Combine the statistics of a step's micro-batches and ranks. Each must appear once.

    ``loss/ratio_mean`` and ``loss/ratio_max`` describe the raw ratio. ``loss/ratio_after_clip_mean`` is the
    mean of the clipped ratio. ``loss/ratio_clipped_frac`` is the share of tokens whose loss was changed by
    clipping. Means and fractions are over tokens.
    """
    total = add_up(parts)
    num_tokens = max(1.0, total.get("sum_tokens", 0.0))

    def mean(name: str) -> float:
        return total.get(name, 0.0) / num_tokens

    return {
        "loss/ratio_mean": mean("sum_ratio"),
        "loss/ratio_max": total.get("max_ratio", 0.0),
        "loss/ratio_after_clip_mean": mean("sum_ratio_after_clip"),
        "loss/ratio_clipped_frac": mean("sum_ratio_clipped"),
        "loss/approx_kl": mean("sum_approx_kl"),
    }
