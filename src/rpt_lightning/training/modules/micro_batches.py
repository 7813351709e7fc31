"""The micro-batches of a pass over sequences, and the gradients that they add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing.trees import PackedTree
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.types import TrainSequence

# Returns a tree's share of the loss. The shares of all trees and ranks add up to the step's loss, so results
# do not depend on how a step is cut.
MicroBatchLoss = Callable[[PackedTree], Tensor]
MicroBatch = PackedTree | None  # None: this rank has no work, but takes part in the collectives of the others


def in_step(trees: Sequence[PackedTree], ranks: Ranks, *, least: int = 0) -> list[MicroBatch]:
    """Append None until every rank has the same number of micro-batches, at least ``least``. A collective.

    Every rank takes part in the collectives of every forward and backward pass.
    """
    number = max(least, int(ranks.max(len(trees))))
    return [*trees, *[None] * (number - len(trees))]


def idle_loss(policy: Policy, *, max_tokens: int, device: torch.device) -> Tensor:
    """Return a loss of 0 that touches every weight, for a micro-batch in which this rank has no work."""
    (tree,) = policy.pack([TrainSequence(prompt_ids=(0,), target_ids=(0,))], max_tokens=max_tokens)
    return cast(Tensor, policy(tree.to(device))[0].sum() * 0.0)


def accumulate_gradients(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    micro_batch_loss: MicroBatchLoss,
    *,
    max_tokens: int,
    device: torch.device,
    backward: Callable[[Tensor], Any],
    without_reduction: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Add up the gradients of this rank's share of the step's loss, and return its loss.

    Args:
        policy: The policy that is trained.
        micro_batches: As ``in_step`` returns them.
        micro_batch_loss: Computes the loss of a tree on ``device``.
        max_tokens: The token budget of a micro-batch.
        device: The device on which this rank computes.
        backward: Runs the backward pass of a loss.
        without_reduction: Wraps the passes before the last, whose gradients need not be reduced over ranks.
    """
    total = torch.zeros((), device=device)
    for number, tree in enumerate(micro_batches, start=1):
        with nullcontext() if number == len(micro_batches) else without_reduction():
            loss = (
                idle_loss(policy, max_tokens=max_tokens, device=device)
                if tree is None
                else micro_batch_loss(tree.to(device))
            )
            backward(loss)
        total += loss.detach()
    return total


def forward_passes(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    *,
    max_tokens: int,
    device: torch.device,
    **options: Any,
) -> Iterator[tuple[PackedTree, Tensor, Tensor]]:
    """Yield each tree with the outputs of the policy's ``forward``. Always exhaust the iterator.

    Args:
        policy: The policy that scores.
        micro_batches: As ``in_step`` returns them.
        max_tokens: The token budget of a micro-batch.
        device: The device on which this rank computes.
        options: Passed on to ``forward``.
    """
    for micro_batch in micro_batches:
        if micro_batch is None:
            idle_loss(policy, max_tokens=max_tokens, device=device)
        else:
            tree = micro_batch.to(device)
            yield (tree, *policy(tree, **options))
