"""Selects the tasks of a step by the current policy's own chance of the truth, before they are rolled out.

A group has a gradient only if its rewards differ. Where the policy is almost sure of the truth, or gives it
almost no chance, all completions tend to earn the same. The rule leaves such tasks out and draws others, as
dynamic sampling does after the rollouts, but for the price of a forward pass over the contexts.

What is left out was drawn from the stream, so the next step continues behind it. There is no surplus and no
pool, as with dynamic sampling. The place in the stream is therefore all that a checkpoint needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rpt_lightning.rollout.places import Draw, OverRanks, alone, fill_places
from rpt_lightning.rollout.settings import Selection
from rpt_lightning.types import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Chance:
    """How the policy, without a thought, sees the truth of a task.

    ``logprob`` (nats, temperature 1) is that of the whole truth. ``entropy`` (nats) is that of the
    distribution of the truth's first token.
    """

    logprob: float
    entropy: float

    @property
    def true_prob(self) -> float:
        return math.exp(self.logprob)


ScoreTasks = Callable[[Sequence[Task]], Sequence[Chance]]
"""Returns the policy's chance at each task, in order. A collective."""


@dataclass(kw_only=True, slots=True)
class SelectionCounts:
    """What one rank's selector did.

    ``drawn`` tasks were scored, and ``in_band`` of them lay in the band. ``kept`` tasks are rolled out,
    ``kept_outside`` of them only because the limit was reached.
    """

    drawn: int = 0
    in_band: int = 0
    kept: int = 0
    kept_outside: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Judged:
    """A task that the policy has scored."""

    task: Task
    is_in_band: bool


class TaskSelector:
    """Keeps the tasks whose truth is neither out of reach nor certain, and draws others for the rest.

    It counts what it did until `take_counts`.

    Args:
        settings: The band, and how many tasks may be drawn.
        score: Asks the policy.
    """

    def __init__(self, settings: Selection, score: ScoreTasks) -> None:
        self.settings = settings
        self.score = score
        self._counts = SelectionCounts()

    def select(self, tasks: Sequence[Task], draw: Draw, *, over_ranks: OverRanks = alone) -> list[Task]:
        """Return this rank's tasks, with further ones in the places of those outside the band. A collective.

        There are as many as before. At the limit of `Selection.max_draws` the remaining places keep the task
        that was drawn last.

        Args:
            tasks: The tasks of this rank's places.
            draw: Draws further tasks, see `fill_places`.
            over_ranks: See `fill_places`.
        """
        num_of_ranks, _ = over_ranks(len(tasks))
        places = fill_places(
            self._judge,
            lambda judged: judged.is_in_band,
            draw,
            tasks,
            max_extra_tasks=self.settings.max_extra_tasks(sum(num_of_ranks)),
            over_ranks=over_ranks,
        )
        num_in_band = sum(judged.is_in_band for judged in places.kept)  # one of these is never replaced
        self._counts.drawn += len(places.kept) + len(places.replaced)
        self._counts.in_band += num_in_band
        self._counts.kept += len(places.kept)
        self._counts.kept_outside += len(places.kept) - num_in_band
        return [judged.task for judged in places.kept]

    def selecting(self, draw: Draw, *, over_ranks: OverRanks = alone) -> Draw:
        """Return a draw whose tasks are selected, for dynamic sampling. It is a collective."""

        def draw_selected(wanted: Sequence[int]) -> Sequence[Task]:
            return self.select(draw(wanted), draw, over_ranks=over_ranks)

        return draw_selected

    def take_counts(self) -> SelectionCounts:
        """Return this rank's counts since the last call."""
        counts, self._counts = self._counts, SelectionCounts()
        return counts

    def _judge(self, tasks: Sequence[Task]) -> list[_Judged]:
        return [
            _Judged(task=task, is_in_band=self.settings.has_in_band(chance.true_prob))
            for task, chance in zip(tasks, self.score(tasks), strict=True)
        ]
