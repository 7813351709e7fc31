"""How the attention of a packed tree is cut into calls of a dense kernel that together compute (nearly) the permitted pairs and no others.

The tokens that agree in ``subtree_end`` and stand in a row are a chain: each the only child of the one before. A chain attends to itself causally, and
everything behind it in its subtree attends to all of it. Both are calls on contiguous slices, so nothing is gathered or masked. Where chains are so
short that the calls would cost more than they save, a whole range is one call with a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Costs are counted in pairs of one query and one key. Measured on two CPU cores in fp32, 9 heads of 64: about 25 million pairs a second forward and
# backward, 150 us of overhead a call and layer, and 2 us to merge one query's output of two calls.
CALL_COST = 4096
MERGE_COST = 48
# A causal kernel skips the upper triangle only in blocks, and its backward pass hardly at all: longer chains are cut so that it becomes calls of full rectangles.
MAX_CHAIN = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentCall:
    """One kernel call: queries ``[query_start, query_stop)`` and keys ``[key_start, key_stop)`` in depth-first order.

    "causal" and "masked" calls are square and hold each token once; "full" calls add the keys of an ancestor chain to what is behind it.
    """

    kind: Literal["causal", "masked", "full"]
    query_start: int
    query_stop: int
    key_start: int
    key_stop: int

    @property
    def num_pairs(self) -> int:
        """Pairs that the kernel computes (a causal one about half of its square)."""
        pairs = (self.query_stop - self.query_start) * (self.key_stop - self.key_start)
        return pairs // 2 if self.kind == "causal" else pairs


def plan_segments(subtree_end: Sequence[int]) -> tuple[SegmentCall, ...]:
    """The cheapest calls for a forest of ``N`` tokens in depth-first order, where token ``i``'s subtree is ``[i, subtree_end[i])``.

    Every permitted pair (``j <= i < subtree_end[j]``) is in exactly one call, and every token is a query of exactly one "causal" or "masked" call, which
    comes before the "full" ones.
    """
    starts = _chain_starts(subtree_end)
    subtrees: dict[
        int, Plan
    ] = {}  # by the first token; filled from the back, so that what is behind a chain is known when the chain is reached
    for start, stop in zip(reversed(starts), reversed([*starts[1:], len(subtree_end)]), strict=True):
        subtrees[start] = min(
            _apart(subtrees, subtree_end, start, stop),
            _masked(start, subtree_end[start]),
            key=lambda plan: plan[0],
        )
    calls = _forest(subtrees, subtree_end, 0, len(subtree_end))[1]
    return tuple(sorted(calls, key=lambda call: call.kind == "full"))


Plan = tuple[float, list[SegmentCall]]


def _chain_starts(subtree_end: Sequence[int]) -> list[int]:
    starts: list[int] = []
    for token, end in enumerate(subtree_end):
        if token == 0 or end != subtree_end[token - 1] or token - starts[-1] == MAX_CHAIN:
            starts.append(token)
    return starts


def _apart(subtrees: dict[int, Plan], subtree_end: Sequence[int], start: int, chain_stop: int) -> Plan:
    """A chain for itself, and what is behind it on top of it."""
    length, behind = chain_stop - start, subtree_end[start] - chain_stop
    cost = length * (length + 1) / 2 + CALL_COST
    calls = [
        SegmentCall(
            kind="causal", query_start=start, query_stop=chain_stop, key_start=start, key_stop=chain_stop
        )
    ]
    if behind:
        full = SegmentCall(
            kind="full",
            query_start=chain_stop,
            query_stop=chain_stop + behind,
            key_start=start,
            key_stop=chain_stop,
        )
        rest_cost, rest = _forest(subtrees, subtree_end, chain_stop, chain_stop + behind)
        cost += full.num_pairs + CALL_COST + MERGE_COST * behind + rest_cost
        calls += [full, *rest]
    return cost, calls


def _forest(subtrees: dict[int, Plan], subtree_end: Sequence[int], start: int, stop: int) -> Plan:
    """Subtrees side by side: each for itself, or runs of neighbours in one masked call, by dynamic programming over the last run."""
    bounds = [start]
    while bounds[-1] < stop:
        bounds.append(subtree_end[bounds[-1]])
    best: list[Plan] = [(0.0, [])]
    for last in range(1, len(bounds)):
        cost, calls = subtrees[bounds[last - 1]]
        choice = (best[-1][0] + cost, last - 1, calls)
        for first in range(last - 2, -1, -1):
            cost, calls = _masked(bounds[first], bounds[last])
            if cost > choice[0]:  # a longer run only costs more
                break
            choice = min(choice, (best[first][0] + cost, first, calls), key=lambda option: option[0])
        best.append((choice[0], best[choice[1]][1] + choice[2]))
    return best[-1]


def _masked(start: int, stop: int) -> Plan:
    call = SegmentCall(kind="masked", query_start=start, query_stop=stop, key_start=start, key_stop=stop)
    return call.num_pairs + CALL_COST, [call]
