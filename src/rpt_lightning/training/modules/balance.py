"""Shares the sequences of an optimizer step over ranks by their packed tokens.

Training waits for the rank with the most tokens. Tasks are dealt to ranks before anything is known about
their completions, so the live ones of a step are spread unevenly, and so are their lengths. The loss is a sum
over ranks, and its denominator is known before, so it does not matter which rank computes a sequence.

All sequences of a document stay on one rank, because they share its text as a prefix, which `pack` computes
once. A document with more tokens than a rank's fair share is divided into its groups, and a group that is
still larger into its completions. That happens only if the busiest rank then has fewer tokens, prefixes that
are computed again included.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np

from rpt_lightning.policy.packing.trees import common_prefix_length
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.types import TokenIds, TrainSequence

Place = tuple[int, int]  # rank, and index in that rank's list


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a sequence comes from.

    Sequences of one document share a prefix, and those of one group share their prompt.
    """

    document: str
    group: str


class Trained(Protocol):
    """Something that is trained: a sequence that comes from somewhere."""

    @property
    def sequence(self) -> TrainSequence: ...
    @property
    def origin(self) -> Origin: ...


T = TypeVar("T", bound=Trained)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Sequences that stay on one rank, and the smaller units into which they may be divided."""

    num_tokens: int  # in a tree of their own
    places: tuple[Place, ...]
    parts: tuple[Unit, ...] = ()
    prompt_ids: TokenIds = ()  # of a document, its longest prompt; other ranks may have the same document

    def parts_above(self, num_tokens: float) -> tuple[Unit, ...]:
        """Return the parts of a unit with more than ``num_tokens``, and none of a smaller one."""
        return self.parts if self.num_tokens > num_tokens else ()


def balanced(items: Sequence[T], ranks: Ranks) -> list[T]:
    """Return this rank's share of the items of all ranks, given its own. A collective.

    Ranks first exchange numbers of tokens and a prompt of each document, and then the items that another rank
    takes.
    """
    if ranks.num_data == 1:
        return list(items)
    rank = ranks.data_rank
    units = ranks.gather(document_units(items, rank=rank))
    owners = {
        place: owner for owner, places in enumerate(shares(joined(units), ranks.num_data)) for place in places
    }
    own = {(rank, index): item for index, item in enumerate(items)}
    leaving = {place: item for place, item in own.items() if owners[place] != rank}
    taken = {place: item for place, item in own.items() if place not in leaving}
    for arriving in ranks.gather(leaving):
        taken |= {place: item for place, item in arriving.items() if owners[place] == rank}
    return [taken[place] for place in sorted(taken)]


def document_units(items: Sequence[Trained], *, rank: int) -> dict[str, Unit]:
    """Return the unit of each document among one rank's items, with groups and completions as parts."""
    documents: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, item in enumerate(items):
        documents[item.origin.document][item.origin.group].append(index)
    ids = [item.sequence.prompt_ids + item.sequence.target_ids for item in items]

    def unit(indices: Sequence[int], parts: Sequence[Unit] = ()) -> Unit:
        return Unit(
            num_tokens=packed_tokens([ids[index] for index in indices]),
            places=tuple((rank, index) for index in indices),
            parts=tuple(parts),
        )

    units = {}
    for document, groups in documents.items():
        parts = [unit(indices, [unit([index]) for index in indices]) for indices in groups.values()]
        indices = [index for indices in groups.values() for index in indices]
        prompt_ids = max((items[index].sequence.prompt_ids for index in indices), key=len)
        units[document] = replace(unit(indices, parts), prompt_ids=prompt_ids)
    return units


def joined(units_of_ranks: Sequence[dict[str, Unit]]) -> list[Unit]:
    """Return the units of all ranks. A document that several ranks hold becomes one unit.

    What its longest prompts have in common is computed only once then.
    """
    of_documents: dict[str, list[Unit]] = defaultdict(list)
    for units in units_of_ranks:
        for document, unit in units.items():
            of_documents[document].append(unit)
    return [
        units[0]
        if len(units) == 1
        else Unit(
            num_tokens=sum(unit.num_tokens for unit in units)
            - _shared_tokens([unit.prompt_ids for unit in units]),
            places=tuple(place for unit in units for place in unit.places),
            parts=tuple(part for unit in units for part in unit.parts),
        )
        for units in of_documents.values()
    ]


def shares(units: Sequence[Unit], num_ranks: int) -> list[list[Place]]:
    """Deal units to ranks so that the busiest rank has few tokens. Return the places of each rank.

    The longest unit comes first, and each goes to the rank with the fewest tokens so far (Graham's rule, at
    most 4/3 of the best for indivisible units). The units are dealt whole, then with the documents above the
    fair share divided, then with such groups divided. The first of the best is taken.

    >>> units = [Unit(num_tokens=n, places=((0, i),)) for i, n in enumerate([3, 9, 5, 4])]
    >>> shares(units, 2)
    [[(0, 1), (0, 0)], [(0, 2), (0, 3)]]
    """
    best: tuple[int, list[list[Place]]] | None = None
    while True:
        dealt = _deal(units, num_ranks)
        if best is None or dealt[0] < best[0]:
            best = dealt
        fair = sum(unit.num_tokens for unit in units) / num_ranks
        if not any(unit.parts_above(fair) for unit in units):
            return best[1]
        units = [part for unit in units for part in (unit.parts_above(fair) or (unit,))]


def _deal(units: Sequence[Unit], num_ranks: int) -> tuple[int, list[list[Place]]]:
    """Return the tokens of the busiest rank, and the places of each rank."""
    places: list[list[Place]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]  # a heap
    for unit in sorted(units, key=lambda unit: (-unit.num_tokens, unit.places)):
        tokens, rank = loads[0]
        heapq.heapreplace(loads, (tokens + unit.num_tokens, rank))
        places[rank] += unit.places
    return max(tokens for tokens, _ in loads), places


def packed_tokens(ids: Sequence[TokenIds]) -> int:
    """Count the tokens of a tree of these sequences, leaves included.

    >>> packed_tokens([(1, 2, 3), (1, 2, 4), (5,)])
    5
    """
    return sum(map(len, ids)) - _shared_tokens(ids)


def _shared_tokens(ids: Sequence[TokenIds]) -> int:
    """Count the tokens that each sequence has in common with the one before it, in lexicographic order."""
    ordered = [np.asarray(one, dtype=np.int64) for one in sorted(ids)]
    return sum(common_prefix_length(one, other) for one, other in pairwise(ordered))
