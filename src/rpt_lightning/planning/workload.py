"""The tokens of one step: what is generated, and what is trained with and without sharing of prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rpt_lightning.data.stream import rank_share
from rpt_lightning.policy.packing import PackedTree, common_prefix_length, pack
from rpt_lightning.types import TokenIds, TrainSequence


@dataclass(frozen=True, kw_only=True)
class TrainTokens:
    """Tokens that a forward and backward pass computes, how many of them are scored, and permitted pairs (a token and one that it attends to)."""

    tokens: int
    scored_tokens: int
    pairs: int


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """One step, of all ranks together where nothing else is said."""

    num_prompts: int
    mean_prompt_tokens: float
    completion_tokens: float  # of one completion, mean
    prefill_tokens: int  # of all prompts, each distinct prefix of a rank's prompts once
    num_completions: int
    packed: TrainTokens
    plain: TrainTokens
    busiest: TrainTokens  # packed, of the rank that has most
    busiest_completions: int  # of the rank that has most
    micro_batches: int  # of the rank that has most
    busy_ranks: int  # that have anything to train
    masked_pairs: int  # of the tree that has most: pairs that attention on CPU computes under a mask, which it keeps


def step_tokens(
    prompts: Sequence[TokenIds],
    *,
    group_size: int,
    completion_tokens: int,
    live_frac: float,
    micro_batch_tokens: int,
    num_ranks: int,
    on_gpu: bool = False,
) -> StepTokens:
    """Packs the step as training would, with completions of the assumed length that share nothing by chance.

    Args:
        prompts: Of all tasks of the step, in the order of the step.
        group_size: Completions a prompt.
        completion_tokens: Assumed length of each.
        live_frac: Share of the groups that are trained: those with unequal rewards. They lie evenly among the others.
        micro_batch_tokens: Budget of a tree.
        num_ranks: Data-parallel ranks.
        on_gpu: Where attention computes no pairs under a mask of its own.
    """
    ranks: list[TrainTokens] = []
    plain = TrainTokens(tokens=0, scored_tokens=0, pairs=0)
    micro_batches = prefill_tokens = most_masked = 0
    for rank in range(num_ranks):
        share = rank_share(prompts, rank=rank, num_ranks=num_ranks)
        prefill_tokens += _distinct_tokens(share)
        live = [prompt for i, prompt in enumerate(share) if int((i + 1) * live_frac) > int(i * live_frac)]
        sequences = [
            # The first token makes a completion unlike any other; negative ids belong to nobody.
            TrainSequence(prompt_ids=prompt, target_ids=(-1 - g,) + (-1,) * (completion_tokens - 1))
            for prompt in live
            for g in range(group_size)
        ]
        trees = list(pack(sequences, max_tokens=micro_batch_tokens))
        micro_batches = max(micro_batches, len(trees))
        if not on_gpu:
            most_masked = max([most_masked, *map(masked_pairs, trees)])
        ranks.append(packed_tokens(trees))
        plain = _sum([plain, plain_tokens(sequences)])
    largest_share = -(-len(prompts) // num_ranks)
    return StepTokens(
        num_prompts=len(prompts),
        mean_prompt_tokens=sum(map(len, prompts)) / len(prompts),
        completion_tokens=completion_tokens,
        prefill_tokens=prefill_tokens,
        num_completions=len(prompts) * group_size,
        packed=_sum(ranks),
        plain=plain,
        busiest=max(ranks, key=lambda rank: rank.tokens),
        busiest_completions=largest_share * group_size,
        micro_batches=micro_batches,
        busy_ranks=sum(rank.tokens > 0 for rank in ranks),
        masked_pairs=most_masked,
    )


def masked_pairs(tree: PackedTree) -> int:
    """Pairs of a tree's "masked" calls (policy/segments.py)."""
    return sum(call.num_pairs for call in tree.tree_mask().calls if call.kind == "masked")


def packed_tokens(trees: Sequence[PackedTree]) -> TrainTokens:
    """What packed trees cost; a token's pairs are as many as its depth."""
    return TrainTokens(
        tokens=sum(tree.num_tokens for tree in trees),
        scored_tokens=sum(tree.targets.numel() for tree in trees),
        pairs=sum(int((tree.position_ids + 1).sum()) for tree in trees),
    )


def plain_tokens(sequences: Sequence[TrainSequence]) -> TrainTokens:
    """What the same sequences cost one by one, without padding."""
    return TrainTokens(
        tokens=sum(sequence.num_tokens for sequence in sequences),
        scored_tokens=sum(len(sequence.target_ids) for sequence in sequences),
        pairs=sum(sequence.num_tokens * (sequence.num_tokens + 1) // 2 for sequence in sequences),
    )


def assumed_prompts(*, num_tasks: int, positions_per_document: int, context_tokens: int, template_tokens: int) -> list[TokenIds]:
    """Prompts of a step whose task folder is not there: the positions of a document lie evenly spread, with ``context_tokens`` as their mean context.

    The template's tokens stand behind the context, where no prompts share them.

    >>> prompts = assumed_prompts(num_tasks=3, positions_per_document=2, context_tokens=3, template_tokens=1)
    >>> [len(prompt) for prompt in prompts]  # two positions of the first document, one of the second
    [3, 5, 4]
    >>> prompts[0][:2] == prompts[1][:2]
    True
    """
    prompts: list[TokenIds] = []
    longest = 2 * context_tokens
    while len(prompts) < num_tasks:
        first = len(prompts) * longest  # no two documents have an id in common
        number = min(positions_per_document, num_tasks - len(prompts))
        contexts = (max(1, round(longest * (i + 1) / (number + 1))) for i in range(number))
        prompts += [tuple(range(first, first + length)) + (-1,) * template_tokens for length in contexts]
    return prompts


def _distinct_tokens(prompts: Sequence[TokenIds]) -> int:
    """Tokens of the trie of the prompts."""
    ids = [np.asarray(prompt, dtype=np.int64) for prompt in sorted(prompts)]
    return sum(map(len, ids)) - sum(common_prefix_length(left, right) for left, right in pairwise(ids))


def _sum(parts: Sequence[TrainTokens]) -> TrainTokens:
    return TrainTokens(
        tokens=sum(part.tokens for part in parts),
        scored_tokens=sum(part.scored_tokens for part in parts),
        pairs=sum(part.pairs for part in parts),
    )
