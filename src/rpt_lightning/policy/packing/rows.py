"""Pack sequences side by side as rows, for models that cannot take a tree.

The layers of such models carry a state from token to token (linear attention). Nothing is shared. Rows are
padded on the right, where a causal model does not see the padding. The completions of a group keep their
order and stay next to each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from rpt_lightning.policy.packing.trees import PackedTree, check_sequences, own_or_none, temperatures_of
from rpt_lightning.types import TrainSequence


def pack_rows(sequences: Sequence[TrainSequence], *, max_tokens: int) -> Iterator[PackedTree]:
    """Pack sequences into batches of at most ``max_tokens`` input tokens, padding included.

    A single sequence that is longer gets a batch of its own.

    Raises:
        ValueError: A sequence has an empty prompt or no target.
    """
    check_sequences(sequences)
    batch: list[int] = []
    width = 0
    for index, sequence in enumerate(sequences):
        length = sequence.num_tokens - 1  # the last token is only a target
        if batch and (len(batch) + 1) * max(width, length) > max_tokens:
            yield _build(sequences, batch, width)
            batch, width = [], 0
        batch.append(index)
        width = max(width, length)
    if batch:
        yield _build(sequences, batch, width)


def _build(sequences: Sequence[TrainSequence], batch: Sequence[int], width: int) -> PackedTree:
    token_ids = torch.zeros(len(batch), width, dtype=torch.int64)
    lengths = [len(sequences[index].target_ids) for index in batch]
    rows = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
    mask = torch.zeros(len(batch), max(lengths), dtype=torch.bool)
    parents: list[int] = []
    targets: list[int] = []
    for row, index in enumerate(batch):
        sequence = sequences[index]
        inputs = (sequence.prompt_ids + sequence.target_ids)[:-1]
        token_ids[row, : len(inputs)] = torch.tensor(inputs)
        rows[row, : lengths[row]] = torch.arange(len(targets), len(targets) + lengths[row])
        mask[row, : lengths[row]] = True
        first = row * width + len(sequence.prompt_ids) - 1
        parents += range(first, first + lengths[row])
        targets += sequence.target_ids
    own = temperatures_of([sequences[index] for index in batch])
    place = torch.arange(len(batch) * width)
    return PackedTree(
        token_ids=token_ids.flatten(),
        position_ids=place % width,
        subtree_end=(place // width + 1) * width,
        parents=torch.tensor(parents),
        targets=torch.tensor(targets),
        rows=rows,
        mask=mask,
        sequence_indices=tuple(batch),
        own_temperatures=own_or_none(np.repeat(own, lengths)),
        row_length=width,
        row_sizes=tuple(sequences[index].num_tokens - 1 for index in batch),
    )
