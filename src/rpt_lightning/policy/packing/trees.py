"""Pack sequences with common prefixes into one tree that computes each shared token once.

All completions of a group share their prompt. All positions of a document share its text up to the earlier
position. `pack` merges every common prefix (a trie over token ids) and lays out the tree in depth-first
order, so the ancestors of token ``i`` are exactly the tokens ``j`` with ``j <= i < subtree_end[j]``. With
this mask, and with each token's depth as its position id, every token sees what it would see alone. The
log-probs and gradients are therefore those of the separate sequences.

Two further savings are also exact. A leaf (usually an end token) is only a target, so it is not fed to the
model. A token that several completions share is scored once, or once for each temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from rpt_lightning.policy.attention.tree_attention import TreeMask
from rpt_lightning.types import TrainSequence


@dataclass(frozen=True, kw_only=True)
class PackedTree:
    """One packed forest: N input tokens in depth-first order, M scored tokens, S sequences.

    ``targets[m]`` is predicted from the hidden state of input token ``parents[m]``. ``rows[s, t]`` is the
    index, among the M scored tokens, of the t-th target token of sequence s. ``mask[s, t]`` is False where
    that sequence is shorter. ``sequence_indices[s]`` is the sequence's place in the list that was packed.

    ``own_temperatures`` are those of the scored tokens whose sequences have their own, and NaN for the
    others. They are None if no sequence has one.

    If ``row_length`` is set, the input tokens are rows of that length with one sequence each, and nothing is
    shared (rows.py). The first ``row_sizes[s]`` tokens of a row belong to the sequence and the rest is
    padding.
    """

    token_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64
    subtree_end: Tensor  # [N] int64
    parents: Tensor  # [M] int64
    targets: Tensor  # [M] int64
    rows: Tensor  # [S, T] int64
    mask: Tensor  # [S, T] bool
    sequence_indices: tuple[int, ...]  # [S]
    own_temperatures: Tensor | None = None  # [M] float32
    row_length: int | None = None
    row_sizes: tuple[int, ...] = ()  # [S] with a row_length
    max_tokens: int | None = None  # the budget it was packed under; a kernel may pad the tree to it

    @property
    def num_tokens(self) -> int:
        """Number of input tokens that the model computes (N), including the padding of rows."""
        return self.token_ids.numel()

    def tree_mask(self) -> TreeMask:
        """Return which token may attend to which."""
        return TreeMask(self.subtree_end, self.position_ids)

    def padded(self, num_tokens: int) -> PackedTree:
        """Append isolated input tokens until the tree has ``num_tokens``."""
        extra = num_tokens - self.num_tokens
        assert extra >= 0
        zeros = self.token_ids.new_zeros(extra)
        alone = torch.arange(self.num_tokens + 1, num_tokens + 1, device=self.token_ids.device)
        return replace(
            self,
            token_ids=torch.cat([self.token_ids, zeros]),
            position_ids=torch.cat([self.position_ids, zeros]),
            subtree_end=torch.cat([self.subtree_end, alone]),
        )

    def temperatures(self, temperature: float) -> float | Tensor:
        """Return the temperature of the scored tokens, ``[M]`` if any has its own.

        Args:
            temperature: That of the sequences without one of their own.
        """
        own = self.own_temperatures
        return temperature if own is None else torch.where(own.isnan(), temperature, own)

    def keep(self, rows: Sequence[int]) -> PackedTree:
        """Return the tree with the targets of some of its sequences only, to unpack values for them.

        The tokens that are fed and scored stay the same.
        """
        if len(rows) == len(self.sequence_indices):
            return self
        chosen = torch.tensor(rows, dtype=torch.int64, device=self.rows.device)
        mask = self.mask[chosen]
        width = int(mask.sum(1).max()) if len(rows) else 0
        return replace(
            self,
            rows=self.rows[chosen, :width],
            mask=mask[:, :width],
            sequence_indices=tuple(self.sequence_indices[row] for row in rows),
        )

    def unpack(self, values: Tensor) -> Tensor:
        """Arrange per-token values ``[M]`` by sequence, ``[S, T]``, with 0 where ``mask`` is False."""
        return torch.where(
            self.mask, values[self.rows], torch.zeros((), dtype=values.dtype, device=values.device)
        )

    def to(self, device: torch.device) -> PackedTree:
        """Return the same tree on another device."""
        moved = {
            name: getattr(self, name).to(device)
            for name in ("token_ids", "position_ids", "subtree_end", "parents", "targets", "rows", "mask")
        }
        own = self.own_temperatures
        return replace(self, **moved, own_temperatures=None if own is None else own.to(device))


def pack(sequences: Sequence[TrainSequence], *, max_tokens: int) -> Iterator[PackedTree]:
    """Pack sequences into trees of at most ``max_tokens`` input tokens.

    A single sequence that is longer gets a tree of its own. Sequences are sorted lexicographically by their
    ids, so neighbours share the longest prefixes. If one tree is not enough, the cuts minimise the number of
    tokens that are computed again, and then the number of trees.

    Raises:
        ValueError: A sequence has no target, or an empty prompt (which could not predict its first target).
    """
    check_sequences(sequences)
    ids = [np.asarray(sequence.prompt_ids + sequence.target_ids, dtype=np.int64) for sequence in sequences]
    order = sorted(
        range(len(sequences)), key=lambda i: (sequences[i].prompt_ids + sequences[i].target_ids, i)
    )

    lengths = [len(ids[index]) for index in order]
    # The prefix that each sequence shares with the one before it.
    shared = [0, *(common_prefix_length(ids[left], ids[right]) for left, right in pairwise(order))]
    for start, stop in _cuts(lengths, shared, max_tokens):
        yield _build_tree(
            sequences, ids, order[start:stop], [0, *shared[start + 1 : stop]], max_tokens=max_tokens
        )


def check_sequences(sequences: Sequence[TrainSequence]) -> None:
    """Raise ValueError if a sequence has no prompt or no target."""
    for index, sequence in enumerate(sequences):
        if not sequence.prompt_ids or not sequence.target_ids:
            raise ValueError(
                f"sequence {index} has {len(sequence.prompt_ids)} prompt and {len(sequence.target_ids)} "
                "target tokens; both must be at least 1"
            )


def _cuts(lengths: Sequence[int], shared: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """Return the range of sorted sequences in each tree.

    Dynamic programming over the last cut finds the fewest tokens in all, and then the fewest trees. A tree of
    sequences ``i .. j-1`` has ``lengths[i] + sum(lengths[k] - shared[k] for i < k < j)`` tokens, leaves
    included.
    """
    num = len(lengths)
    # [num], summed over the sequences up to each one: the tokens that it does not share with its predecessor.
    fresh = np.cumsum(np.asarray(lengths) - np.asarray(shared))
    begin = np.asarray(lengths) - fresh  # [num] so that a tree of i .. j-1 has begin[i] + fresh[j-1] tokens
    # For the first j sequences: (tokens, trees) in one number, in which tokens come first.
    best = np.zeros(num + 1, dtype=np.int64)
    last_start = np.zeros(num + 1, dtype=np.int64)
    earliest = 0  # only grows, because adding an earlier sequence never makes a tree smaller
    for stop in range(1, num + 1):
        while earliest < stop - 1 and begin[earliest] + fresh[stop - 1] > max_tokens:
            earliest += 1
        costs = best[earliest:stop] + (begin[earliest:stop] + fresh[stop - 1]) * (num + 1) + 1
        choice = int(costs.argmin())
        best[stop], last_start[stop] = costs[choice], earliest + choice
    ranges = []
    stop = num
    while stop:
        start = int(last_start[stop])
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


def _build_tree(
    sequences: Sequence[TrainSequence],
    ids: Sequence[np.ndarray],
    chosen: Sequence[int],
    shared: Sequence[int],
    *,
    max_tokens: int,
) -> PackedTree:
    """Build the trie of lexicographically sorted sequences.

    Each sequence appends its nodes after the common prefix, which gives depth-first order.
    """
    total = sum(len(ids[index]) - common for index, common in zip(chosen, shared, strict=True))
    token = np.empty(total, dtype=np.int64)
    depth = np.empty(total, dtype=np.int64)
    parent = np.empty(total, dtype=np.int64)
    end = np.empty(total, dtype=np.int64)
    path = np.empty(0, dtype=np.int64)  # nodes from a root to the last token of the latest sequence
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

    # Leaves are only targets. Renumber the inner nodes. `before[i]` counts the kept nodes before i.
    keep = np.zeros(total, dtype=bool)
    keep[parent[parent >= 0]] = True
    before = np.concatenate([[0], np.cumsum(keep)])

    own = temperatures_of([sequences[index] for index in chosen])
    kinds, kind_of_row = np.unique(own, return_inverse=True)  # all NaN are one kind
    is_target = np.zeros((len(kinds), total), dtype=bool)
    for kind, index, nodes in zip(kind_of_row, chosen, paths, strict=True):
        is_target[kind, nodes[len(sequences[index].prompt_ids) :]] = True
    kind_of_target, target_nodes = np.nonzero(is_target)
    target_index = np.cumsum(is_target).reshape(is_target.shape) - 1

    width = max(len(sequences[index].target_ids) for index in chosen)
    rows = np.zeros((len(chosen), width), dtype=np.int64)
    mask = np.zeros((len(chosen), width), dtype=bool)
    for row, (index, nodes) in enumerate(zip(chosen, paths, strict=True)):
        targets = target_index[kind_of_row[row], nodes[len(sequences[index].prompt_ids) :]]
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
        own_temperatures=own_or_none(kinds[kind_of_target]),
        max_tokens=max_tokens,
    )


def temperatures_of(sequences: Sequence[TrainSequence]) -> np.ndarray:
    """Return the own temperature of each sequence, float32 ``[S]``, and NaN for those without one."""
    own = [sequence.temperature for sequence in sequences]
    return np.array([np.nan if value is None else value for value in own], dtype=np.float32)


def own_or_none(temperatures: np.ndarray) -> Tensor | None:
    """Return ``PackedTree.own_temperatures`` of scored tokens: None if all of them are NaN."""
    return None if np.isnan(temperatures).all() else torch.from_numpy(temperatures)
