"""The trunk of a step: next-token training on the contexts of its tasks, beside the policy gradient.

The packed tree forwards every context for its completions anyway. `Trunk` makes sequences of the contexts,
which `pack` merges with the prompts that begin with the same tokens. Their targets then cost the head, a
larger backward pass, and the contexts of zero-variance groups.

Each position of a document is a target only once in a step, however many tasks, groups and ranks hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rpt_lightning.policy.packing.trees import PackedTree
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.training.modules.balance import Origin
from rpt_lightning.training.modules.samples import origin_of
from rpt_lightning.types import RolloutGroup, Task, TokenIds, TrainSequence

TEMPERATURE = 1.0  # next-token prediction is measured at 1, whatever rollouts are sampled at


class Span(NamedTuple):
    """The text that a task carries: the tokens ``start`` to ``end`` (exclusive) of a document."""

    doc_id: str
    start: int
    end: int

    @classmethod
    def of(cls, task: Task, *, max_tokens: int | None = None) -> Span:
        """Return a task's context, and the rest of its document if the task carries it.

        The span has at most ``max_tokens`` tokens.
        """
        start = task.position - len(task.context_ids)
        end = task.position + len(task.rest_ids)
        return cls(task.doc_id, start, end if max_tokens is None else min(end, start + max_tokens))


@dataclass(frozen=True, kw_only=True)
class ContextSequence:
    """A context as a sequence to train on, and the group in whose prompt it stands."""

    sequence: TrainSequence
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """This rank's context sequences of one optimizer step.

    ``num_targets`` is the number of target tokens on all ranks.
    """

    sequences: tuple[ContextSequence, ...] = ()
    num_targets: int = 0

    def loss(self, tree: PackedTree, logprobs: Tensor, *, first: int) -> tuple[Tensor, PackedTree]:
        """Return a tree's share of the step's mean next-token loss, and the tree without the contexts.

        The shares of all trees and ranks add up to the mean (nats per token).

        Args:
            tree: A tree of a list of sequences that ends with the contexts.
            logprobs: Log-probs of the tree's scored tokens, ``[M]``.
            first: Index of the first context in the list.
        """
        contexts = [row for row, index in enumerate(tree.sequence_indices) if index >= first]
        others = [row for row, index in enumerate(tree.sequence_indices) if index < first]
        if not contexts:
            return logprobs.new_zeros(()), tree
        return -tree.keep(contexts).unpack(logprobs).sum() / self.num_targets, tree.keep(others)


def check_rests(groups: Sequence[RolloutGroup]) -> None:
    """Check that all tasks carry the rest of their documents. Raises ValueError if one does not."""
    for group in groups:
        if not group.task.rest_ids:
            raise ValueError(
                f"model.ntp_whole_documents=true: the data module hands out {group.task.task_id} without the "
                "rest of its document; give false, or use TokenTaskDataModule"
            )


def context_sequences(
    groups: Sequence[RolloutGroup],
    *,
    start_ids: TokenIds,
    in_prompt: bool,
    ranks: Ranks,
    max_tokens: int | None = None,
) -> Contexts:
    """Return sequences in which each context position of the step is a target once. This is a collective.

    Where tasks carry the rest of their documents, its positions are targets too. A context's first token is
    no target, as in next-token training. A document that several ranks hold is trained on the first of them.

    Args:
        groups: This rank's groups of the optimizer step, zero-variance groups included.
        start_ids: The tokens before every text.
        in_prompt: Take each context as it stands in its prompt. Otherwise it is a separate text.
        ranks: The ranks of the step.
        max_tokens: Most tokens of a sequence, with ``start_ids``. None sets no limit.

    Raises:
        ValueError: With ``in_prompt``, a prompt does not hold the context.
    """
    limit = None if max_tokens is None else max_tokens - len(start_ids)
    spans = [Span.of(group.task, max_tokens=limit) for group in groups]
    of_ranks = ranks.gather(spans)
    first_targets = first_target_positions(span for part in of_ranks for span in part)
    num_targets = sum(span.end - first for span, first in first_targets.items())
    elsewhere = {span for part in of_ranks[: ranks.data_rank] for span in part}
    sequences = []
    for group, span in zip(groups, spans, strict=True):
        first = first_targets.pop(span, None)
        if first is not None and span not in elsewhere:
            before = _prefix_ids(group) if in_prompt else start_ids
            text_ids = (*group.task.context_ids, *group.task.rest_ids)[: span.end - span.start]
            cut = first - span.start
            sequence = TrainSequence(
                prompt_ids=before + text_ids[:cut],
                target_ids=text_ids[cut:],
                temperature=TEMPERATURE,
            )
            sequences.append(ContextSequence(sequence=sequence, origin=origin_of(group)))
    return Contexts(sequences=tuple(sequences), num_targets=num_targets)


def first_target_positions(spans: Iterable[Span]) -> dict[Span, int]:
    """Return the contexts that are trained, each with the first position that it trains.

    Of all contexts that begin at the same token of a document, the longest is enough. Contexts that were
    truncated on the left begin at different tokens. There each trains what those before it do not reach.

    >>> first_target_positions([Span("a", 0, 3), Span("a", 0, 7), Span("a", 2, 9), Span("b", 0, 1)])
    {Span(doc_id='a', start=0, end=7): 1, Span(doc_id='a', start=2, end=9): 7}
    """
    longest: dict[tuple[str, int], int] = {}
    for doc_id, start, end in spans:
        longest[doc_id, start] = max(end, longest.get((doc_id, start), end))
    reached: dict[str, int] = {}
    first_targets: dict[Span, int] = {}
    for (doc_id, start), end in sorted(longest.items()):
        first = max(start + 1, reached.get(doc_id, start + 1))
        if first < end:
            first_targets[Span(doc_id, start, end)] = first
            reached[doc_id] = end
    return first_targets


def _prefix_ids(group: RolloutGroup) -> TokenIds:
    """Return the tokens before the context in a prompt."""
    prefix_ids = group.prompt_ids[: group.num_prefix_tokens]
    context_ids = tuple(group.task.context_ids)
    if group.prompt_ids[len(prefix_ids) :][: len(context_ids)] != context_ids:
        raise ValueError(
            f"model.ntp_in_prompt=true: the prompt of {group.task.task_id} does not hold the text before the "
            "position unchanged, so its tokens cannot be trained there; give false, which trains the text by "
            "itself"
        )
    return prefix_ids


def mean_loss(parts: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Return the sum of a step's shares over micro-batches and ranks."""
    return ranks.sum(sum((part.detach().double() for part in parts), torch.zeros(())))
