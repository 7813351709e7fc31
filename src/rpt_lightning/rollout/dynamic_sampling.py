"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2; RPT uses it from step 500 on): groups that teach nothing give their place to new tasks.

A group whose rewards are all equal (those of masked completions do not count) has zero advantages. It is replaced by the group of a freshly drawn task,
until every place holds a live group or a limit is reached; the places that are left keep their dead group, so that a step always has the same size.

DAPO oversamples and keeps what is too much for the next step. Here every round draws exactly as many tasks as places are still
dead, so nothing is left over: no group is trained with weights that it was not generated with, and there is no pool to store in
a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rpt_lightning.types import RolloutGroup, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class FilledBatch:
    """``groups`` are trained, as many as there were tasks; ``replaced`` are the dead groups that gave up their place.

    Every rolled-out task is in exactly one of the two.
    """

    groups: tuple[RolloutGroup, ...]
    replaced: tuple[RolloutGroup, ...]
    num_rounds: int

    @property
    def num_dead(self) -> int:
        """Dead groups that were trained after all."""
        return sum(not group.is_live for group in self.groups)


def fill_batch(
    rollout: Callable[[Sequence[Task]], Sequence[RolloutGroup]],
    draw: Callable[[Sequence[int]], Sequence[Task]],
    tasks: Sequence[Task],
    *,
    max_extra_tasks: int,
    over_ranks: Callable[[int], tuple[Sequence[int], int]] = lambda number: ((number,), 0),
) -> FilledBatch:
    """Rolls out the tasks and replaces dead groups by groups of further tasks.

    The ranks' places, one rank after the other, are those of the whole step, and so are their draws: which place gets which task does not depend on the
    number of ranks. ``rollout`` may be a collective (a reward may ask the policy): all ranks do as many rounds as the one that needs most, and a rank that
    needs nothing draws 0 tasks and rolls them out.

    Args:
        rollout: Groups for tasks, in their order.
        draw: Takes the next tasks of the stream, so many for each rank, and returns this rank's; fewer, or none, where it ends.
        tasks: The step's.
        max_extra_tasks: At most so many tasks are drawn in addition by all ranks together; 0 turns dynamic sampling off.
        over_ranks: A number of each rank, in their order, and this rank's place among them. A collective.
    """
    groups = list(rollout(tasks))
    replaced: list[RolloutGroup] = []
    num_rounds = 0
    stream_ended = False
    num_left = max_extra_tasks
    while True:
        dead = [place for place, group in enumerate(groups) if not group.is_live]
        num_dead, rank = over_ranks(0 if stream_ended else len(dead))
        # What is left is given to the first places of the step.
        wanted = [max(0, min(num, num_left - sum(num_dead[:before]))) for before, num in enumerate(num_dead)]
        if sum(wanted) == 0:
            break
        num_left -= sum(wanted)
        extra = draw(wanted)
        stream_ended = len(extra) < wanted[rank]
        num_rounds += bool(extra)
        # A dead newcomer takes a place as well, and is replaced in the next round like any other.
        for place, group in zip(dead[: len(extra)], rollout(extra), strict=True):
            replaced.append(groups[place])
            groups[place] = group
    return FilledBatch(groups=tuple(groups), replaced=tuple(replaced), num_rounds=num_rounds)
