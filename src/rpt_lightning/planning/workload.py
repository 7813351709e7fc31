"""Tokens of one step: those generated, and those trained with and without shared prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rpt_lightning.data.modules.stream import rank_share
from rpt_lightning.policy.flops import Work, add_works, prompt_work, sampling_work, sequence_work, tree_work
from rpt_lightning.policy.packing.trees import PackedTree, common_prefix_length, pack
from rpt_lightning.types import TokenIds, TrainSequence


@dataclass(frozen=True, kw_only=True)
class StepTokens:
    """Tokens of one step, over all ranks unless a field says otherwise."""

    num_prompts: int
    mean_prompt_tokens: float
    completion_tokens: float  # of one completion, mean
    prefill: Work  # of all prompts, with each distinct prefix of a rank's prompts counted once
    prefill_alone: Work  # the same without a prefix cache, so every completion reads its prompt
    sampling: Work
    num_completions: int
    packed: Work
    plain: Work
    busiest: Work  # packed, of the rank with the most tokens
    micro_batches: int  # of the rank with the most micro-batches
    busy_ranks: int  # ranks that have anything to train
    masked_pairs: (
        int  # of the tree with the most: pairs that attention on CPU computes under a mask, which it keeps
    )


def step_tokens(
    prompts: Sequence[TokenIds],
    *,
    group_size: int,
    completion_tokens: int,
    live_frac: float,
    micro_batch_tokens: int,
    num_ranks: int,
    on_gpu: bool = False,
    trains_contexts: bool = False,
) -> StepTokens:
    """Pack the step as training would, with completions of the assumed length that share nothing by chance.

    Args:
        prompts: Prompts of all tasks of the step, in the order of the step.
        group_size: Completions for each prompt.
        completion_tokens: Assumed length of each completion.
        live_frac: Share of the step's groups that are trained, because their rewards differ. At least one
            group is trained. These groups are spread evenly among the others.
        micro_batch_tokens: Token budget of a tree.
        num_ranks: Number of data-parallel ranks.
        on_gpu: Whether training runs on a GPU, where attention computes no pairs under a separate mask.
        trains_contexts: Whether the step also trains next-token prediction on the prompts of all groups, each
            position once (`model.ntp_weight`).
    """
    ranks: list[Work] = []
    plain = prefill = Work()
    micro_batches = most_masked = 0
    is_live = [int((i + 1) * live_frac) > int(i * live_frac) for i in range(len(prompts))]
    is_live[-1] |= not any(is_live)
    for rank in range(num_ranks):
        share = rank_share(prompts, rank=rank, num_ranks=num_ranks)
        prefill += _trie_work(share)
        live = [
            prompt
            for prompt, trained in zip(
                share, rank_share(is_live, rank=rank, num_ranks=num_ranks), strict=True
            )
            if trained
        ]
        sequences = [
            # The first token makes each completion unique. No real token has a negative id.
            TrainSequence(prompt_ids=prompt, target_ids=(-1 - g,) + (-1,) * (completion_tokens - 1))
            for prompt in live
            for g in range(group_size)
        ]
        if trains_contexts:
            sequences += _contexts(share)
        trees = list(pack(sequences, max_tokens=micro_batch_tokens))
        micro_batches = max(micro_batches, len(trees))
        if not on_gpu:
            most_masked = max([most_masked, *map(masked_pairs, trees)])
        ranks.append(add_works(map(tree_work, trees)))
        plain += add_works(map(sequence_work, sequences))
    return StepTokens(
        num_prompts=len(prompts),
        mean_prompt_tokens=sum(map(len, prompts)) / len(prompts),
        completion_tokens=completion_tokens,
        prefill=prefill,
        prefill_alone=add_works(group_size * prompt_work(len(prompt)) for prompt in prompts),
        sampling=add_works(group_size * sampling_work(len(prompt), completion_tokens) for prompt in prompts),
        num_completions=len(prompts) * group_size,
        packed=add_works(ranks),
        plain=plain,
        busiest=max(ranks, key=lambda rank: rank.tokens),
        micro_batches=micro_batches,
        busy_ranks=sum(rank.tokens > 0 for rank in ranks),
        masked_pairs=most_masked,
    )


def _contexts(prompts: Sequence[TokenIds]) -> list[TrainSequence]:
    """Return sequences in which each position of the prompts is a target once, except for first tokens."""
    ordered = sorted(set(prompts))
    ids = [np.asarray(prompt, dtype=np.int64) for prompt in ordered]
    shared = [0, *(common_prefix_length(left, right) for left, right in pairwise(ids))]
    return [
        TrainSequence(prompt_ids=prompt[:first], target_ids=prompt[first:])
        for prompt, common in zip(ordered, shared, strict=False)
        if (first := max(1, common)) < len(prompt)
    ]


def masked_pairs(tree: PackedTree) -> int:
    """Count the pairs of a tree's "masked" calls (policy/attention/segments.py)."""
    return sum(call.num_pairs for call in tree.tree_mask().calls if call.kind == "masked")


def assumed_prompts(
    *, num_tasks: int, positions_per_document: int, context_tokens: int, template_tokens: int
) -> list[TokenIds]:
    """Make the prompts of a step if there is no task folder.

    The positions of a document are evenly spread, with ``context_tokens`` as their mean context. The
    template's tokens come after the context, where prompts share nothing.

    >>> prompts = assumed_prompts(num_tasks=3, positions_per_document=2, context_tokens=3, template_tokens=1)
    >>> [len(prompt) for prompt in prompts]  # two positions of the first document, one of the second
    [3, 5, 4]
    >>> prompts[0][:2] == prompts[1][:2]
    True
    """
    prompts: list[TokenIds] = []
    longest = 2 * context_tokens
    while len(prompts) < num_tasks:
        first = len(prompts) * longest  # no two documents share a token id
        number = min(positions_per_document, num_tasks - len(prompts))
        contexts = (max(1, round(longest * (i + 1) / (number + 1))) for i in range(number))
        prompts += [tuple(range(first, first + length)) + (-1,) * template_tokens for length in contexts]
    return prompts


def _trie_work(prompts: Sequence[TokenIds]) -> Work:
    """Return the work of reading all prompts, with each common prefix read once."""
    ids = [np.asarray(prompt, dtype=np.int64) for prompt in sorted(prompts)]
    shared = [0, *(common_prefix_length(left, right) for left, right in pairwise(ids))][: len(ids)]
    return add_works(
        prompt_work(len(prompt), num_cached=common) for prompt, common in zip(ids, shared, strict=True)
    )
