"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2), which RPT uses from step 500 on.

If all rewards of a group are equal, its advantages are zero (rewards of masked completions do not count).
Such a zero-variance group is replaced by the group of a newly drawn task. This continues until every place
holds a group whose rewards differ or a limit is reached. The remaining places keep their zero-variance group,
so a step always has the same size.

If a task led to others in the same step (``RolloutGroup.follow_ups``), their groups share its place. They
keep it if the rewards of any of them differ.

DAPO oversamples and keeps the surplus for the next step. Here every round draws exactly as many tasks as
there are places left with a zero-variance group, so there is no surplus. Every group is trained with the
weights that generated it, and there is no pool to store in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rpt_lightning.rollout.places import Draw, OverRanks, alone, fill_places
from rpt_lightning.types import RolloutGroup, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class FilledBatch:
    """The result of `fill_batch`. Every rolled-out task is in exactly one of ``groups`` and ``replaced``.

    ``groups`` are trained. There is one for each place, followed by its follow-ups. ``replaced`` are the
    groups that gave up their place, in which no rewards differ.
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
    draw: Draw,
    tasks: Sequence[Task],
    *,
    max_extra_tasks: int,
    over_ranks: OverRanks = alone,
) -> FilledBatch:
    """Roll out the tasks and replace zero-variance groups by groups of further tasks (`fill_places`).

    ``rollout`` may be a collective, because a reward may query the policy.

    Args:
        rollout: Returns groups for tasks, in their order.
        draw: Draws further tasks. It returns fewer, or none, at the end of the stream.
        tasks: The tasks of the step.
        max_extra_tasks: Largest number of additional tasks that all ranks may draw together. 0 turns dynamic
            sampling off.
        over_ranks: Takes this rank's number and returns the numbers of all ranks in order, with this rank's
            index. A collective.
    """
    places = fill_places(
        rollout,
        lambda group: any(one.is_live for one in group.family),
        draw,
        tasks,
        max_extra_tasks=max_extra_tasks,
        over_ranks=over_ranks,
    )
    return FilledBatch(
        groups=_families(places.kept), replaced=_families(places.replaced), num_rounds=places.num_rounds
    )


def _families(groups: Sequence[RolloutGroup]) -> tuple[RolloutGroup, ...]:
    return tuple(one for group in groups for one in group.family)
