"""The loss of one optimizer step of RPT, micro-batch by micro-batch, and the statistics of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rpt_lightning.algo.correction import (
    CorrectionLevel,
    CorrectionStatistics,
    truncated_importance_weights,
)
from rpt_lightning.algo.loss import Aggregation, LossStatistics, policy_loss
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing.trees import PackedTree
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.training.modules.samples import Sample
from rpt_lightning.training.modules.trunk import Contexts, mean_loss

Correction = Literal["none", "truncate", "mask"]


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """How the loss of a token is formed, and how tokens are combined (the options of ``RPTModule``)."""

    aggregation: Aggregation
    clip_low: float
    clip_high: float
    correction: Correction
    correction_cap: float
    correction_level: CorrectionLevel
    correction_floor: float | None
    ntp_weight: float


class PolicyGradient:
    """Computes the loss of a step's trees, and collects statistics of their tokens.

    Args:
        policy: The policy that is trained.
        samples: This rank's samples with a gradient.
        contexts: This rank's sequences of the next-token term.
        old_logprobs: The policy's log-probs of each sample before the first update of the batch. None: the
            policy has not changed since then.
        temperature: That of the rollouts.
        normalizer: The step's denominator, of all ranks.
        settings: How the loss is formed.
    """

    def __init__(
        self,
        policy: Policy,
        samples: Sequence[Sample],
        contexts: Contexts,
        *,
        old_logprobs: Sequence[Tensor] | None,
        temperature: float,
        normalizer: float,
        settings: LossSettings,
    ) -> None:
        self.policy = policy
        self.samples = samples
        self.contexts = contexts
        self.old_logprobs = old_logprobs
        self.temperature = temperature
        self.normalizer = normalizer
        self.settings = settings
        self.sequences = [
            *(sample.sequence for sample in samples),
            *(context.sequence for context in contexts.sequences),
        ]
        self._losses: list[LossStatistics] = []
        self._corrections: list[CorrectionStatistics] = []
        self._entropies: list[Tensor] = []
        self._ntp_losses: list[Tensor] = []

    def loss(self, tree: PackedTree) -> Tensor:
        """Return the share of a tree of ``sequences`` in the step's loss."""
        logprobs, entropy = self.policy(tree, temperature=self.temperature)
        ntp_loss, tree = self.contexts.loss(tree, logprobs, first=len(self.samples))
        self._ntp_losses.append(ntp_loss.detach())
        loss = self.settings.ntp_weight * ntp_loss
        if not tree.sequence_indices:  # it holds contexts only
            return loss
        self._entropies.append(tree.unpack(entropy.detach())[tree.mask])
        return self._policy_loss(tree, tree.unpack(logprobs)) + loss

    def _policy_loss(self, tree: PackedTree, logprobs: Tensor) -> Tensor:
        """Return the policy-gradient loss of completions with log-probs ``[S, T]``."""
        samples = [self.samples[index] for index in tree.sequence_indices]
        old = (
            logprobs.detach()
            if self.old_logprobs is None
            else _padded([self.old_logprobs[index] for index in tree.sequence_indices], like=logprobs)
        )
        advantages = [sample.advantage for sample in samples]
        loss, statistics = policy_loss(
            logprobs,
            old,
            torch.tensor(advantages, dtype=logprobs.dtype, device=logprobs.device),
            tree.mask,
            clip_low=self.settings.clip_low,
            clip_high=self.settings.clip_high,
            aggregation=self.settings.aggregation,
            normalizer=self.normalizer,
            correction=self._correction(samples, old, tree.mask),
        )
        self._losses.append(statistics)
        return loss

    def _correction(self, samples: Sequence[Sample], old: Tensor, mask: Tensor) -> Tensor | None:
        """Return the importance weights between policy and engine, ``[S, T]``, if the loss takes them.

        Their statistics are collected in any case.
        """
        settings = self.settings
        weights, statistics = truncated_importance_weights(
            old,
            _padded([sample.rollout_logprobs for sample in samples], like=old),
            mask,
            cap=settings.correction_cap,
            mode="truncate" if settings.correction == "none" else settings.correction,
            level=settings.correction_level,
            floor=settings.correction_floor,
        )
        self._corrections.append(statistics)
        return None if settings.correction == "none" else weights

    def metrics(self, ranks: Ranks) -> dict[str, Tensor | float]:
        """Return the metrics of the trees so far. A collective."""
        metrics: dict[str, Tensor | float] = {}
        if self.settings.ntp_weight > 0:
            metrics |= {
                "loss/ntp": mean_loss(self._ntp_losses, ranks),
                "train/ntp_tokens": float(self.contexts.num_targets),
            }
        of_ranks = ranks.gather(
            (LossStatistics.combined(self._losses), CorrectionStatistics.combined(self._corrections))
        )
        metrics |= LossStatistics.combined(loss for loss, _ in of_ranks).metrics()
        metrics |= CorrectionStatistics.combined(correction for _, correction in of_ranks).metrics()
        entropy = ranks.sum(sum((part.double().sum() for part in self._entropies), torch.zeros(())))
        num_tokens = ranks.sum(sum(part.numel() for part in self._entropies))
        return metrics | {
            "policy/entropy": entropy / num_tokens.clamp(min=1),
            "train/live_completions": ranks.sum(len(self.samples)),
        }


def _padded(rows: Sequence[Sequence[float] | Tensor], *, like: Tensor) -> Tensor:
    """Rows of numbers, padded with 0 to the shape, dtype and device of ``like`` [S, T]."""
    out = torch.zeros_like(like, requires_grad=False)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.as_tensor(row, dtype=like.dtype, device=like.device)
    return out
