"""Tasks that follow from the completions of others, in the same step (``Objective.follow_ups``).

A proposer's reward depends on how its proposals are answered. So the completions of a step's tasks are read
first, then the tasks that follow from them are rolled out with the same weights, and only then are the first
completions rewarded.

Both kinds of groups are trained. A task and its follow-ups share one place of the step (dynamic_sampling.py),
so the place in the task stream is all that a checkpoint needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rpt_lightning.objectives.base import Objective
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.rollout.settings import Selection
from rpt_lightning.types import RolloutGroup, Task


class FollowUpRollout:
    """Roll out as ``Rollouter.rollout`` does, and whatever follows from the completions.

    It takes that method's place before `fill_batch`.

    Args:
        rollouter: Draws, reads and rewards the completions of both kinds of tasks.
    """

    def __init__(self, rollouter: Rollouter) -> None:
        self.rollouter = rollouter

    def rollout(self, tasks: Sequence[Task]) -> list[RolloutGroup]:
        """Return one group for each task, in order, with the groups of its follow-ups.

        With several ranks, each must call this equally often, with no tasks if it has none.
        """
        rollouter = self.rollouter
        group_size = rollouter.group_size
        first_indices = rollouter.reserve(tasks, group_size)
        answered = rollouter.answered(tasks, rollouter.complete(tasks, first_indices, group_size))
        further = [rollouter.objective.follow_ups(one) for one in answered]
        groups = iter(rollouter.rollout([task for row in further for task in row]))
        return rollouter.rewarded(
            [
                replace(one, follow_ups=tuple(next(groups) for _ in row))
                for one, row in zip(answered, further, strict=True)
            ]
        )


def check_follow_ups(
    objective: Objective, *, pilot_size: int | None, max_staleness: int, selection: Selection
) -> None:
    """Raise ValueError if the objective has follow-ups and a setting cannot be combined with them."""
    if not objective.has_follow_ups:
        return
    for flag, is_set, why, off in [
        (
            f"--rollout.max_staleness {max_staleness}",
            max_staleness > 0,
            "rollouts that are too old are drawn again task by task, without what they led to",
            "--rollout.max_staleness 0",
        ),
        (
            f"--rollout.pilot_size {pilot_size}",
            pilot_size is not None,
            "a pilot would be rewarded by follow-ups that the whole group does not have",
            "--rollout.pilot_size null",
        ),
        (
            "--rollout.selection",
            selection.is_on,
            "it judges the places of the data, and not the tasks that the policy makes of them",
            "--rollout.selection.min_true_prob 0, max_true_prob 1 and by_kind false",
        ),
    ]:
        if is_set:
            raise ValueError(
                f"{flag}: cannot be combined with {type(objective).__name__}, whose tasks follow from the "
                f"policy's own completions ({why}); give {off}, or another objective"
            )
