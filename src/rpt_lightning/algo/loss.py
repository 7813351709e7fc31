"""The clipped policy-gradient loss of GRPO (arXiv:2402.03300, equation 3).

Choices that RPT leaves open are parameters. The KL and entropy coefficients are 0 in RPT's runs, so neither
term is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rpt_lightning.algo.statistics import Number, Statistics, larger

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


@dataclass(frozen=True, kw_only=True)
class LossStatistics(Statistics):
    """Sums and the maximum of the ratios of some tokens."""

    ratio_sum: Number = 0.0
    ratio_max: Number = 0.0
    clipped_ratio_sum: Number = 0.0
    num_changed_by_clipping: Number = 0.0  # tokens whose loss was changed by clipping
    approx_kl_sum: Number = 0.0  # nats

    def __add__(self, other: LossStatistics) -> LossStatistics:
        return LossStatistics(
            num_tokens=self.num_tokens + other.num_tokens,
            ratio_sum=self.ratio_sum + other.ratio_sum,
            ratio_max=larger(self.ratio_max, other.ratio_max),
            clipped_ratio_sum=self.clipped_ratio_sum + other.clipped_ratio_sum,
            num_changed_by_clipping=self.num_changed_by_clipping + other.num_changed_by_clipping,
            approx_kl_sum=self.approx_kl_sum + other.approx_kl_sum,
        )

    def metrics(self) -> dict[str, float]:
        """Return what is logged. Means and fractions are over tokens.

        ``loss/ratio_mean`` and ``loss/ratio_max`` describe the raw ratio. ``loss/ratio_after_clip_mean`` is
        the mean of the clipped ratio. ``loss/ratio_clipped_frac`` is the share of tokens whose loss was
        changed by clipping.
        """
        return {
            "loss/ratio_mean": self.per_token(self.ratio_sum),
            "loss/ratio_max": float(self.ratio_max),
            "loss/ratio_after_clip_mean": self.per_token(self.clipped_ratio_sum),
            "loss/ratio_clipped_frac": self.per_token(self.num_changed_by_clipping),
            "loss/approx_kl": self.per_token(self.approx_kl_sum),
        }


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
) -> tuple[Tensor, LossStatistics]:
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

    Returns the loss and its statistics, which combine exactly over micro-batches and ranks.
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
        statistics = LossStatistics(
            num_tokens=mask.sum().double(),
            ratio_sum=ratio[mask].double().sum(),
            ratio_max=ratio.masked_fill(~mask, 0.0).double().max()
            if ratio.numel()
            else ratio.new_zeros(()).double(),
            clipped_ratio_sum=clipped_ratio[mask].double().sum(),
            num_changed_by_clipping=(clipped_loss > unclipped_loss)[mask].double().sum(),
            # k3 of http://joschu.net/blog/kl-approx.html, a non-negative estimate of KL(old || new).
            approx_kl_sum=(ratio - 1.0 - log_ratio)[mask].double().sum(),
        )
    return loss, statistics
