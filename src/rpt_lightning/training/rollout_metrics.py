"""What is logged of a step's rollouts, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer

from rpt_lightning.metrics.rollout_stats import rollout_statistics
from rpt_lightning.rollout.dynamic_sampling import FilledBatch

SUMS = ("rollout/live_groups", "rollout/replaced_groups", "rollout/dead_groups_kept", "rollout/tokens", "train/completion_tokens")


def rollout_metrics(filled: FilledBatch) -> dict[str, float]:
    """Of one rank: statistics of everything that was rolled out, the sampled tokens, and those of them that are trained (live groups)."""
    groups = [*filled.groups, *filled.replaced]
    return rollout_statistics(groups) | {
        "rollout/replaced_groups": float(len(filled.replaced)),
        "rollout/dead_groups_kept": float(filled.num_dead),
        "rollout/tokens": float(sum(len(completion.token_ids) for group in groups for completion in group.completions)),
        "train/completion_tokens": float(sum(len(c.token_ids) for group in filled.groups if group.is_live for c in group.completions)),
    }


def over_ranks(trainer: Trainer, metrics: Mapping[str, float], *, num_groups: int) -> dict[str, float]:
    """The same metrics over all ranks: sums add up, times and differences are those of the worst rank, and means weigh every group equally.

    A collective: every rank calls it with the same names and its own ``num_groups``. One process gets its metrics back.
    """
    if trainer.world_size == 1:
        return dict(metrics)
    names = sorted(metrics)
    own = torch.tensor([float(num_groups), *(metrics[name] for name in names)], dtype=torch.float64, device=trainer.strategy.root_device)
    gathered = trainer.strategy.all_gather(own).cpu()  # [ranks, 1 + names]
    weights, reduced = gathered[:, 0], {}
    for name, values in zip(names, gathered[:, 1:].unbind(1), strict=True):
        if name in SUMS:
            reduced[name] = values.sum().item()
        elif name.startswith(("time/", "sync/")) or name.endswith("_max"):
            reduced[name] = values.max().item()
        else:
            reduced[name] = ((values * weights).sum() / weights.sum()).item()
    return reduced
