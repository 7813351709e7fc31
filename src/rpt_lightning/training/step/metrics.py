"""The logged metrics of a step's rollouts, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping

from rpt_lightning.metrics.rollout_stats import STATISTICS, rollout_statistics
from rpt_lightning.policy.flops import Work, add_works, prompt_work, sampling_work
from rpt_lightning.rollout.dynamic_sampling import FilledBatch
from rpt_lightning.rollout.position_kinds import KindShares
from rpt_lightning.rollout.selection import SelectionCounts
from rpt_lightning.rollout.weight_sync.sent_weights import SentWeights
from rpt_lightning.types import PromptTokens

PROMPT_SUMS = ("rollout/prompt_tokens", "rollout/cached_prompt_tokens", "rollout/shareable_prompt_tokens")
COSTS = ("rollout/tokens", "rollout/prefill_tokens", *PROMPT_SUMS)


def rollout_metrics(filled: FilledBatch, *, pilot_size: int | None = None) -> dict[str, float]:
    """Statistics of everything that one rank rolled out, and its sampled tokens.

    All are zero, which adds nothing, if the step has fewer tasks than ranks.
    """
    groups = [*filled.groups, *filled.replaced]
    metrics = (
        rollout_statistics(groups, pilot_size=pilot_size) if groups else dict.fromkeys(STATISTICS, 0.0)
    ) | {
        "rollout/replaced_groups": float(len(filled.replaced)),
        "rollout/dead_groups_kept": float(filled.num_dead),
        "rollout/tokens": float(
            sum(len(completion.token_ids) for group in groups for completion in group.completions)
        ),
    }
    if pilot_size is not None:
        metrics["rollout/pilot_filled_frac"] = sum(
            len(group.completions) > pilot_size for group in groups
        ) / max(1, len(groups))
    return metrics


def prompt_metrics(filled: FilledBatch, step: PromptTokens | None) -> dict[str, float]:
    """The prompt tokens that the engine of one data-parallel rank computed in a step.

    If the engine has a prefix cache (``step`` is not None), the tokens that it saved are included.
    """
    if step is None:
        # Without a cache every completion computes its prompt again.
        groups = [*filled.groups, *filled.replaced]
        return {
            "rollout/prefill_tokens": float(
                sum(len(group.prompt_ids) * len(group.completions) for group in groups)
            )
        }
    return {"rollout/prefill_tokens": float(step.total - step.cached)} | dict(
        zip(PROMPT_SUMS, map(float, (step.total, step.cached, step.shareable)), strict=True)
    )


def server_metrics(servers: tuple[int, int] | None) -> dict[str, float]:
    """Usable and lost servers of one rank's engine (`RolloutEngine.servers`)."""
    return (
        {}
        if servers is None
        else {"run/usable_servers": float(servers[0]), "run/lost_servers": float(servers[1])}
    )


def selection_metrics(counts: SelectionCounts, kinds: KindShares | None = None) -> dict[str, float]:
    """What one rank's selection did in a step, and the share of the best kind if kinds are preferred."""
    metrics = {
        "selection/drawn": float(counts.drawn),
        "selection/in_band": float(counts.in_band),
        "selection/kept": float(counts.kept),
        "selection/kept_outside": float(counts.kept_outside),
    }
    if kinds is not None:
        metrics |= {
            "selection/accepted": float(counts.accepted),
            "selection/best_kind_frac": kinds.best_share,
        }
    return metrics


def selection_fractions(metrics: Mapping[str, float]) -> dict[str, float]:
    """Shares of the sums of `selection_metrics` over all ranks. Empty if the run selects nothing.

    >>> counts = SelectionCounts(drawn=40, in_band=10, kept=16, kept_outside=6)
    >>> selection_fractions(selection_metrics(counts))
    {'selection/in_band_frac': 0.25, 'selection/drawn_per_kept': 2.5}
    """
    if "selection/drawn" not in metrics:
        return {}
    drawn = metrics["selection/drawn"]
    return {
        "selection/in_band_frac": metrics["selection/in_band"] / drawn,
        "selection/drawn_per_kept": drawn / metrics["selection/kept"],
    }


def sent_metrics(sent: SentWeights | None) -> dict[str, float]:
    """What one rank sent in the latest weight sync (`RolloutEngine.sent_weights`). Only the first sends."""
    return (
        {}
        if sent is None
        else {
            "sync/sent_bytes": float(sent.num_bytes),
            "sync/full_bytes": float(sent.num_full_bytes),
            "sync/changed_frac": sent.changed_frac,
        }
    )


def rollout_work(filled: FilledBatch, *, prefill_tokens: float) -> Work:
    """Work of one rank's engine for everything that was rolled out.

    Only the number of computed prompt tokens is known (`prompt_metrics`), not which ones they were. Their
    share of all token pairs is assumed to be the same.
    """
    groups = [*filled.groups, *filled.replaced]
    prompts = add_works(len(group.completions) * prompt_work(len(group.prompt_ids)) for group in groups)
    sampling = add_works(
        sampling_work(len(group.prompt_ids), len(completion.token_ids))
        for group in groups
        for completion in group.completions
    )
    return prefill_tokens / max(1, prompts.tokens) * prompts + sampling


def cached_fractions(metrics: Mapping[str, float]) -> dict[str, float]:
    """Shares of the sums of `prompt_metrics` over all ranks. A share whose denominator is 0 is left out."""
    total, cached, shareable = (metrics.get(name, 0.0) for name in PROMPT_SUMS)
    shares = {"rollout/cached_prompt_frac": total, "rollout/cached_shareable_frac": shareable}
    return {name: cached / tokens for name, tokens in shares.items() if tokens}


def throughput(logged: Mapping[str, float]) -> dict[str, float]:
    """What a step did in a second, from its other metrics over all ranks."""
    step_s, rollout_tokens = logged["time/step_s"], logged["rollout/tokens"]
    # Generation beside the training of other steps has a time of its own.
    generation_s = logged.get("time/generation_s") or logged["time/rollout_s"]
    return {
        "perf/rollout_tokens_per_s": rollout_tokens / generation_s,
        "perf/tokens_per_s": (rollout_tokens + logged["train/completion_tokens"]) / step_s,
        "perf/live_groups_per_s": logged["train/groups"] / step_s,
    }
