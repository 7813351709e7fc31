"""Pilot completions: first a few for each task, and the rest of the group only if those few differ in reward.

Most groups in RPT have equal rewards, so nothing is learned from them. A few completions often reveal this.
docs/pilot.md explains the effect on the estimate: each task's gradient keeps its direction, but tasks are
weighted differently. `tests/rollout/test_pilot_estimate.py` measures by how much.
"""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.types import RolloutGroup, Task


class PilotRollout:
    """Roll out as ``Rollouter.rollout`` does. It takes that method's place before `fill_batch`.

    A filled group equals, completion by completion, the group that one undivided draw would have given. The
    other groups have equal rewards and stay short.

    Args:
        rollouter: Draws, reads and rewards the completions. Its ``group_size`` is the size of a filled group.
        pilot_size: Completions that every task gets. It is at least 2, because a single one has nothing to
            differ from, and below ``group_size``.
    """

    def __init__(self, rollouter: Rollouter, *, pilot_size: int) -> None:
        if not 2 <= pilot_size < rollouter.group_size:
            raise ValueError(
                f"--rollout.pilot_size {pilot_size}: a pilot needs at least 2 completions and fewer than the "
                f"group (--rollout.group_size {rollouter.group_size}); null turns it off"
            )
        self.rollouter = rollouter
        self.pilot_size = pilot_size

    def rollout(self, tasks: Sequence[Task]) -> list[RolloutGroup]:
        """Return one group for each task, in order.

        With several ranks, each must call this equally often, with no tasks if it has none.
        """
        group_size = self.rollouter.group_size
        # Indices for the whole group are reserved. The same task in a later round, or after a resume,
        # therefore draws the same completions as without a pilot.
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
        # The whole group is rewarded again, since a reward may look at all of it.
        filled = self.rollouter.groups(
            promising, [pilots[place] + more for place, more in zip(places, rest, strict=True)]
        )
        for place, group in zip(places, filled, strict=True):
            groups[place] = group
        return groups
