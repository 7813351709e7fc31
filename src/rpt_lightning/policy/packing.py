"""Sequences with common prefixes, packed into one tree that computes each shared token once.

All completions of a group share their prompt, and all positions of a document share its text up to the earlier one. `pack` merges whatever prefix is
common (a trie over token ids) and lays the tree out in depth-first order, so that the ancestors of token ``i`` are exactly the tokens ``j`` with
``j <= i < subtree_end[j]``. With that mask, and each token's depth as its position id, every token sees what it would see alone: log-probs and
gradients are those of the separate sequences.

Two further savings are exact as well: a leaf (usually an end token) is only ever a target, so it is not fed to the model; and a token that several
completions share is scored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rpt_lightning.types import TrainSequence


@dataclass(frozen=True, kw_only=True)
class PackedTree:
    """One packed forest: N input tokens in depth-first order, M scored tokens, S sequences.

    ``targets[m]`` is predicted from the hidden state of input token ``parents[m]``. ``rows[s, t]`` is the index into the M scored tokens of the t-th
    target token of the s-th sequence, and ``mask[s, t]`` is False where that sequence is shorter. ``sequence_indices[s]`` is the sequence's place in
    the list that was packed.
    """

    token_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64
    subtree_end: Tensor  # [N] int64
    parents: Tensor  # [M] int64
    targets: Tensor  # [M] int64
    rows: Tensor  # [S, T] int64
    mask: Tensor  # [S, T] bool
    sequence_indices: tuple[int, ...]  # [S]

    @property
    def num_tokens(self) -> int:
        """Input tokens that the model computes (N)."""
        return self.token_ids.numel()

    def attention_mask(self) -> Tensor:
        """Which token may attend to which: ``[1, 1, N, N]`` bool, True = may attend."""
        index = torch.arange(self.num_tokens, device=self.token_ids.device)
        causal = index[None, :] <= index[:, None]  # [N, N]
        inside = index[:, None] < self.subtree_end[None, :]  # [N, N]
        return (causal & inside)[None, None]

    def unpack(self, values: Tensor) -> Tensor:
        """Per-token values ``[M]`` as one row a sequence, ``[S, T]``; 0 where ``mask`` is False."""
        return torch.where(self.mask, values[self.rows], torch.zeros((), dtype=values.dtype, device=values.device))

    def to(self, device: torch.device) -> PackedTree:
        """The same tree on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("token_ids", "position_ids", "subtree_end", "parents", "targets", "rows", "mask")}
        return replace(self, **moved)


def pack(sequences: Sequence[TrainSequence], *, max_tokens: int) -> Iterator[PackedTree]:
    """Packs sequences into trees of at most ``max_tokens`` input tokens (a single longer sequence gets a tree of its own).

    Sequences are taken in lexicographic order of their ids, where neighbours share the longest prefixes, and a tree is closed when the next sequence's
    new tokens would exceed the budget.

    Raises:
        ValueError: A sequence has an empty prompt (its first target would be predicted from nothing) or no target.
    """
    for index, sequence in enumerate(sequences):
        if not sequence.prompt_ids or not sequence.target_ids:
            raise ValueError(
                f"sequence {index} has {len(sequence.prompt_ids)} prompt and {len(sequence.target_ids)} target tokens; both must be at least 1"
            )
    ids = [np.asarray(sequence.prompt_ids + sequence.target_ids, dtype=np.int64) for sequence in sequences]
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i].prompt_ids + sequences[i].target_ids, i))

    chosen: list[int] = []
    shared: list[int] = []  # tokens that each chosen sequence shares with the one before it in the same tree
    num_tokens = 0
    for position, index in enumerate(order):
        common = common_prefix_length(ids[order[position - 1]], ids[index]) if chosen else 0
        new_tokens = len(ids[index]) - common
        if chosen and num_tokens + new_tokens > max_tokens:
            yield _build_tree(sequences, ids, chosen, shared)
            chosen, shared, num_tokens, common, new_tokens = [], [], 0, 0, len(ids[index])
        chosen.append(index)
        shared.append(common)
        num_tokens += new_tokens
    if chosen:
        yield _build_tree(sequences, ids, chosen, shared)


def common_prefix_length(a: np.ndarray, b: np.ndarray) -> int:
    """Number of leading elements in which two integer arrays agree.

    >>> common_prefix_length(np.array([5, 6, 7]), np.array([5, 6, 9, 1]))
    2
    """
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length


def _build_tree(sequences: Sequence[TrainSequence], ids: Sequence[np.ndarray], chosen: Sequence[int], shared: Sequence[int]) -> PackedTree:
    """Builds the trie of lexicographically sorted sequences: each appends the nodes beyond its common prefix, which is depth-first order."""
    total = sum(len(ids[index]) - common for index, common in zip(chosen, shared, strict=True))
    token = np.empty(total, dtype=np.int64)
    depth = np.empty(total, dtype=np.int64)
    parent = np.empty(total, dtype=np.int64)
    end = np.empty(total, dtype=np.int64)
    path = np.empty(0, dtype=np.int64)  # nodes from a root to the last token of the sequence just added
    paths: list[np.ndarray] = []
    size = 0
    for index, common in zip(chosen, shared, strict=True):
        end[path[common:]] = size  # the branches left behind are complete
        fresh = np.arange(size, size + len(ids[index]) - common)
        token[fresh] = ids[index][common:]
        depth[fresh] = np.arange(common, len(ids[index]))
        parent[fresh] = fresh - 1
        if len(fresh):
            parent[fresh[0]] = path[common - 1] if common else -1
        path = np.concatenate([path[:common], fresh])
        paths.append(path)
        size += len(fresh)
    end[path] = size

    # Leaves are targets only. Renumber the inner nodes; `before[i]` counts the kept nodes in front of i.
    keep = np.zeros(total, dtype=bool)
    keep[parent[parent >= 0]] = True
    before = np.concatenate([[0], np.cumsum(keep)])

    is_target = np.zeros(total, dtype=bool)
    for index, nodes in zip(chosen, paths, strict=True):
        is_target[nodes[len(sequences[index].prompt_ids) :]] = True
    target_nodes = np.flatnonzero(is_target)
    target_index = np.cumsum(is_target) - 1

    width = max(len(sequences[index].target_ids) for index in chosen)
    rows = np.zeros((len(chosen), width), dtype=np.int64)
    mask = np.zeros((len(chosen), width), dtype=bool)
    for row, (index, nodes) in enumerate(zip(chosen, paths, strict=True)):
        targets = target_index[nodes[len(sequences[index].prompt_ids) :]]
        rows[row, : len(targets)] = targets
        mask[row, : len(targets)] = True

    return PackedTree(
        token_ids=torch.from_numpy(token[keep]),
        position_ids=torch.from_numpy(depth[keep]),
        subtree_end=torch.from_numpy(before[end[keep]]),
        parents=torch.from_numpy(before[parent[target_nodes]]),
        targets=torch.from_numpy(token[target_nodes]),
        rows=torch.from_numpy(rows),
        mask=torch.from_numpy(mask),
        sequence_indices=tuple(chosen),
    )
