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
from itertools import pairwise

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

    Sequences are taken in lexicographic order of their ids, where neighbours share the longest prefixes. Where one tree is not enough, the cuts are those
    that compute the fewest tokens again, and among these the fewest trees.

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

    lengths = [len(ids[index]) for index in order]
    shared = [0, *(common_prefix_length(ids[left], ids[right]) for left, right in pairwise(order))]  # with the sequence before
    for start, stop in _cuts(lengths, shared, max_tokens):
        yield _build_tree(sequences, ids, order[start:stop], [0, *shared[start + 1 : stop]])


def _cuts(lengths: Sequence[int], shared: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """Ranges of the sorted sequences, one a tree: the fewest tokens in all, then the fewest trees, by dynamic programming over the last cut.

    A tree of sequences ``i .. j-1`` has ``lengths[i] + sum(lengths[k] - shared[k] for i < k < j)`` tokens (its leaves included).
    """
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # of the first j sequences: tokens, trees, where the last tree starts
    for stop in range(1, len(lengths) + 1):
        candidates: list[tuple[int, int, int]] = []
        branches = 0  # tokens of the tree that its first sequence does not hold
        for start in range(stop - 1, -1, -1):
            tokens = lengths[start] + branches
            if candidates and tokens > max_tokens:  # adding an earlier sequence never makes a tree smaller
                break
            candidates.append((best[start][0] + tokens, best[start][1] + 1, start))
            branches += lengths[start] - shared[start]
        best.append(min(candidates))
    ranges = []
    stop = len(lengths)
    while stop:
        start = best[stop][2]
        ranges.append((start, stop))
        stop = start
    return ranges[::-1]


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
