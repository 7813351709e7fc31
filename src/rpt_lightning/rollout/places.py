"""Fills the places of a step, drawing further tasks for those whose content is not good enough.

Two rules do this: selection before the rollouts (selection.py) and dynamic sampling after them
(dynamic_sampling.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rpt_lightning.types import Task

T = TypeVar("T")
Draw = Callable[[Sequence[int]], Sequence[Task]]
"""Takes the number of tasks that each rank needs, draws them and returns this rank's share."""
OverRanks = Callable[[int], tuple[Sequence[int], int]]
"""Takes a rank's number and returns the numbers of all ranks in order, with its index. A collective."""


def alone(number: int) -> tuple[Sequence[int], int]:
    """`OverRanks` of a single process."""
    return (number,), 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FilledPlaces(Generic[T]):
    """What stands in this rank's places, in order, and what gave up its place to something drawn later."""

    kept: tuple[T, ...]
    replaced: tuple[T, ...]
    num_rounds: int


def fill_places(
    make: Callable[[Sequence[Task]], Sequence[T]],
    is_good: Callable[[T], bool],
    draw: Draw,
    tasks: Sequence[Task],
    *,
    max_extra_tasks: int,
    over_ranks: OverRanks = alone,
) -> FilledPlaces[T]:
    """Make something of each task, and replace what is not good by what is made of further tasks.

    Each round draws exactly as many tasks as there are places left, so nothing is left over. At the limit the
    places keep what they hold.

    The places of a step are those of all ranks, one rank after the other, and the ranks draw in this order
    too. Which place gets which task therefore does not depend on the number of ranks. ``make`` may be a
    collective. All ranks therefore do as many rounds as the rank that needs the most. A rank that needs
    nothing draws 0 tasks and makes nothing of them.

    Args:
        make: Returns one thing for each task, in their order.
        is_good: Whether a thing may keep its place.
        draw: See `Draw`. It returns fewer tasks, or none, at the end of the stream.
        tasks: The tasks of this rank's places.
        max_extra_tasks: Largest number of additional tasks that all ranks may draw together.
        over_ranks: See `OverRanks`.
    """
    kept = list(make(tasks))
    replaced: list[T] = []
    num_rounds = 0
    stream_ended = False
    num_left = max_extra_tasks
    while True:
        open_places = [place for place, thing in enumerate(kept) if not is_good(thing)]
        num_open, rank = over_ranks(0 if stream_ended else len(open_places))
        # The remaining budget goes to the first places of the step.
        wanted = [max(0, min(num, num_left - sum(num_open[:before]))) for before, num in enumerate(num_open)]
        if sum(wanted) == 0:
            break
        num_left -= sum(wanted)
        extra = draw(wanted)
        stream_ended = len(extra) < wanted[rank]
        num_rounds += bool(extra)
        # A new thing that is not good takes the place too, and the next round replaces it like any other.
        for place, thing in zip(open_places[: len(extra)], make(extra), strict=True):
            replaced.append(kept[place])
            kept[place] = thing
    return FilledPlaces(kept=tuple(kept), replaced=tuple(replaced), num_rounds=num_rounds)
