"""Random forests in depth-first order, for tests of code that uses trees."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


def forest(num_closed: list[int]) -> list[int]:
    """Return ``subtree_end`` of each token.

    Token ``i`` first closes ``num_closed[i]`` open subtrees, then opens its own.
    """
    ends, path = [0] * len(num_closed), []
    for token, closed in enumerate(num_closed):
        for _ in range(min(closed, len(path))):
            ends[path.pop()] = token
        path.append(token)
    for token in path:
        ends[token] = len(num_closed)
    return ends


def forests(max_tokens: int) -> st.SearchStrategy[list[int]]:
    # Most numbers are 0, which makes chains. Large numbers start new trees.
    return st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 2, 5, 99]), min_size=1, max_size=max_tokens).map(
        forest
    )


def permitted(subtree_end: list[int]) -> Tensor:
    """Return bool [N, N], computed from the definition."""
    return torch.tensor(
        [[key <= query < end for key, end in enumerate(subtree_end)] for query in range(len(subtree_end))]
    )


def depths(subtree_end: list[int]) -> Tensor:
    return permitted(subtree_end).sum(1) - 1
