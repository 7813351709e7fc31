"""Reduces metrics over all ranks, each as the registry says."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rpt_lightning.metrics.metric import Reduction
from rpt_lightning.metrics.registry import registered
from rpt_lightning.training.distributed.ranks import Ranks


def over_ranks(ranks: Ranks, metrics: Mapping[str, float], *, num_groups: int) -> dict[str, float]:
    """Reduce metrics over all ranks, each as it is registered. A collective.

    Every rank calls it with the same names and its own ``num_groups``. With a single process the metrics are
    unchanged.

    Raises:
        ValueError: A metric is not registered.
    """
    reductions = {name: registered(name).reduction for name in sorted(metrics)}
    gathered = torch.tensor(
        ranks.gather([float(num_groups), *(metrics[name] for name in reductions)]), dtype=torch.float64
    )  # [ranks, 1 + names]
    return {
        name: _reduced(values, reduction, num_groups=gathered[:, 0])
        for (name, reduction), values in zip(reductions.items(), gathered[:, 1:].unbind(1), strict=True)
    }


def _reduced(values: Tensor, reduction: Reduction, *, num_groups: Tensor) -> float:
    """Reduce a metric's values on all ranks, [ranks]."""
    if reduction is Reduction.SUM:
        return float(values.sum())
    if reduction is Reduction.MAX:
        return float(values.max())
    if reduction is Reduction.MIN:
        return float(values.min())
    assert reduction is Reduction.MEAN_OVER_GROUPS, "ranks already agree on this metric"
    return float((values * num_groups).sum() / num_groups.sum())
