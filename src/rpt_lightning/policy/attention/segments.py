"""Plan the attention of a packed tree as calls of a dense kernel.

Together the calls compute the permitted pairs and (nearly) no others. Consecutive tokens with the same
``subtree_end`` form a chain, in which each token is the only child of the one before. A chain attends to
itself causally. Everything after it in its subtree attends to all of it. Both are calls on contiguous slices,
so nothing is gathered or masked. If chains are so short that separate calls would cost more than they save, a
whole range becomes one call with a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Costs are in units of one pair of a query and a key. Measured on two CPU cores in fp32 with 9 heads of 64:
# about 25 million pairs a second forward and backward, 150 us of overhead per call and layer, and 2 us to
# merge one query's output of two calls.
CALL_COST = 4096
MERGE_COST = 48
# A causal kernel skips the upper triangle only in blocks, and its backward pass skips almost none of it.
# Longer chains are therefore cut, which turns most of the triangle into calls of full rectangles.
MAX_CHAIN = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentCall:
    """One kernel call on contiguous ranges of queries and keys, in depth-first order.

    The ranges are ``[query_start, query_stop)`` and ``[key_start, key_stop)``. "causal" and "masked" calls
    are square and contain each token once. "full" calls add the keys of an ancestor chain to the tokens after
    it.
    """

    kind: Literal["causal", "masked", "full"]
    query_start: int
    query_stop: int
    key_start: int
    key_stop: int

    @property
    def num_pairs(self) -> int:
        """Number of pairs that the kernel computes, which for a causal call is about half of its square."""
        pairs = (self.query_stop - self.query_start) * (self.key_stop - self.key_start)
        return pairs // 2 if self.kind == "causal" else pairs


def plan_segments(subtree_end: Sequence[int]) -> tuple[SegmentCall, ...]:
    """Find the cheapest calls for a forest of ``N`` tokens in depth-first order.

    Token ``i``'s subtree is ``[i, subtree_end[i])``. Every permitted pair (``j <= i < subtree_end[j]``) is in
    exactly one call. Every token is a query of exactly one "causal" or "masked" call, which comes before the
    "full" ones.
    """
    starts = _chain_starts(subtree_end)
    # By first token. Filled from the back, so everything after a chain is known when the chain is reached.
    subtrees: dict[int, Plan] = {}
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
    """Plan one call for the chain, one from its descendants to it, and the descendants' own calls."""
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
    """Plan subtrees that lie side by side.

    Each subtree is planned by itself, or a run of neighbours becomes one masked call. Dynamic programming
    over the last run finds the cheapest choice.
    """
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
