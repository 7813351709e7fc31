"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2), which RPT uses from step 500 on.

If all rewards of a group are equal, its advantages are zero (rewards of masked completions do not count).
Such a zero-variance group is replaced by the group of a newly drawn task. This continues until every place
holds a group whose rewards differ or a limit is reached. The remaining places keep their zero-variance group,
so a step always has the same size.

DAPO oversamples and keeps the surplus for the next step. Here every round draws exactly as many tasks as
there are places left with a zero-variance group, so there is no surplus. Every group is trained with the
weights that generated it, and there is no pool to store in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rpt_lightning.types import RolloutGroup, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class FilledBatch:
    """The result of `fill_batch`. Every rolled-out task is in exactly one of ``groups`` and ``replaced``.

    ``groups`` are trained, and there are as many as there were tasks. ``replaced`` are the zero-variance
    groups that gave up their place.
    """

    groups: tuple[RolloutGroup, ...]
    replaced: tuple[RolloutGroup, ...]
    num_rounds: int

    @property
    def num_dead(self) -> int:
        """Number of zero-variance groups that are trained after all."""
        return sum(not group.is_live for group in self.groups)


def fill_batch(
    rollout: Callable[[Sequence[Task]], Sequence[RolloutGroup]],
    draw: Callable[[Sequence[int]], Sequence[Task]],
    tasks: Sequence[Task],
    *,
    max_extra_tasks: int,
    over_ranks: Callable[[int], tuple[Sequence[int], int]] = lambda number: ((number,), 0),
) -> FilledBatch:
    """Roll out the tasks and replace zero-variance groups by groups of further tasks.

    The places of a step are those of all ranks, one rank after the other, and the ranks draw in this order
    too. Which place gets which task therefore does not depend on the number of ranks. ``rollout`` may be a
    collective, because a reward may query the policy. All ranks therefore do as many rounds as the rank that
    needs the most. A rank that needs nothing draws 0 tasks and rolls them out.

    Args:
        rollout: Returns groups for tasks, in their order.
        draw: Takes the number of tasks that each rank needs, draws them from the stream and returns this
            rank's share. It returns fewer, or none, at the end of the stream.
        tasks: The tasks of the step.
        max_extra_tasks: Largest number of additional tasks that all ranks may draw together. 0 turns dynamic
            sampling off.
        over_ranks: Takes this rank's number and returns the numbers of all ranks in order, with this rank's
            index. A collective.
    """
    groups = list(rollout(tasks))
    replaced: list[RolloutGroup] = []
    num_rounds = 0
    stream_ended = False
    num_left = max_extra_tasks
    while True:
        dead = [place for place, group in enumerate(groups) if not group.is_live]
        num_dead, rank = over_ranks(0 if stream_ended else len(dead))
        # The remaining budget goes to the first places of the step.
        wanted = [max(0, min(num, num_left - sum(num_dead[:before]))) for before, num in enumerate(num_dead)]
        if sum(wanted) == 0:
            break
        num_left -= sum(wanted)
        extra = draw(wanted)
        stream_ended = len(extra) < wanted[rank]
        num_rounds += bool(extra)
        # A new group with zero variance takes the place too, and the next round replaces it like any other.
        for place, group in zip(dead[: len(extra)], rollout(extra), strict=True):
            replaced.append(groups[place])
            groups[place] = group
    return FilledBatch(groups=tuple(groups), replaced=tuple(replaced), num_rounds=num_rounds)
