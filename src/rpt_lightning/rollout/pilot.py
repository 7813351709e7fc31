"""Pilot completions: a few of each task first, and the rest of a group only where the few already differ.

Most groups of RPT have equal rewards and teach nothing; whether they do is often seen from a few completions. What this does to the estimate is in
docs/pilot.md: each task's gradient keeps its direction, but tasks count differently, and `tests/rollout/test_pilot_estimate.py` says by how much.
"""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.types import RolloutGroup, Task


class PilotRollout:
    """Rolls out like ``Rollouter.rollout``, which it stands in for before `fill_batch`.

    A filled group is the group that an undivided draw would have given, completion by completion. The other groups are dead and stay short.

    Args:
        rollouter: Draws, reads and pays; its ``group_size`` is that of a filled group.
        pilot_size: Completions that every task gets, at least 2 (one alone has nothing to differ from) and fewer than ``group_size``.
    """

    def __init__(self, rollouter: Rollouter, *, pilot_size: int) -> None:
        if not 2 <= pilot_size < rollouter.group_size:
            raise ValueError(
                f"--rollout.pilot_size {pilot_size}: a pilot has at least 2 completions and fewer than the group (--rollout.group_size "
                f"{rollouter.group_size}); null turns it off"
            )
        self.rollouter = rollouter
        self.pilot_size = pilot_size

    def rollout(self, tasks: Sequence[Task]) -> list[RolloutGroup]:
        """One group a task, in the order of the tasks; with several ranks each calls it equally often, with no tasks where it has none."""
        group_size = self.rollouter.group_size
        # The whole group's completions are set aside, so that neither the same task in a later round nor a resumed run draws others than without pilot.
        first_indices = self.rollouter.reserve(tasks, group_size)
        pilots = self.rollouter.complete(tasks, first_indices, self.pilot_size)
        groups = self.rollouter.groups(tasks, pilots)
        places = [place for place, group in enumerate(groups) if group.is_live]
        promising = [tasks[place] for place in places]
        rest = self.rollouter.complete(
            promising,
            [first_indices[place] + self.pilot_size for place in places],
            group_size - self.pilot_size,
        )
        # Paid anew as a whole: a reward may look at all of a group.
        filled = self.rollouter.groups(
            promising, [pilots[place] + more for place, more in zip(places, rest, strict=True)]
        )
        for place, group in zip(places, filled, strict=True):
            groups[place] = group
        return groups
