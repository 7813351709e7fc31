"""Selects the tasks of a step by the current policy's own chance of the truth, before they are rolled out.

A group has a gradient only if its rewards differ. Where the policy is almost sure of the truth, or gives it
almost no chance, all completions tend to earn the same. The rule leaves such tasks out and draws others, as
dynamic sampling does after the rollouts, but for the price of a forward pass over the contexts.

What is left out was drawn from the stream, so the next step continues behind it. There is no surplus and no
pool, as with dynamic sampling. A checkpoint needs only the place in the stream, and the counts of
position_kinds.py if kinds are preferred.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rpt_lightning.rollout.places import Draw, OverRanks, alone, fill_places
from rpt_lightning.rollout.position_kinds import KindShares, kind_of, num_kinds
from rpt_lightning.rollout.seeds import task_uniform
from rpt_lightning.rollout.settings import Selection
from rpt_lightning.types import RolloutGroup, Task


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

    ``drawn`` tasks were scored, and ``in_band`` of them lay in the band. ``accepted`` of those may be rolled
    out (all, unless kinds are preferred). ``kept`` tasks are rolled out, ``kept_outside`` of them only
    because the limit was reached.
    """

    drawn: int = 0
    in_band: int = 0
    accepted: int = 0
    kept: int = 0
    kept_outside: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Judged:
    """A task that the policy has scored."""

    task: Task
    is_in_band: bool
    is_accepted: bool
    kind: int


class TaskSelector:
    """Keeps the tasks whose truth is neither out of reach nor certain, and draws others for the rest.

    It counts what it did until `take_counts`.

    Args:
        settings: The band, and how many tasks may be drawn.
        score: Asks the policy.
        seed: Run seed, for the choice among tasks of less preferred kinds.
        kinds: Which kinds are preferred. None: no kind is.
    """

    def __init__(
        self, settings: Selection, score: ScoreTasks, *, seed: int = 0, kinds: KindShares | None = None
    ) -> None:
        self.settings = settings
        self.score = score
        self.seed = seed
        self.kinds = kinds
        self._counts = SelectionCounts()
        self._kind_of: dict[str, int] = {}  # by task id, since the last `learn`

    def select(
        self, tasks: Sequence[Task], draw: Draw, *, version: int = 0, over_ranks: OverRanks = alone
    ) -> list[Task]:
        """Return this rank's tasks, with further ones in the places of those that are not selected.

        There are as many as before. At the limit of `Selection.max_draws` the remaining places keep the task
        that was drawn last. A collective.

        Args:
            tasks: The tasks of this rank's places.
            draw: Draws further tasks, see `fill_places`.
            version: Version of the policy that scores.
            over_ranks: See `fill_places`.
        """
        num_of_ranks, _ = over_ranks(len(tasks))
        places = fill_places(
            lambda some: self._judge(some, version),
            lambda judged: judged.is_accepted,
            draw,
            tasks,
            max_extra_tasks=self.settings.max_extra_tasks(sum(num_of_ranks)),
            over_ranks=over_ranks,
        )
        drawn, counts = [*places.kept, *places.replaced], self._counts
        counts.drawn += len(drawn)
        counts.in_band += sum(judged.is_in_band for judged in drawn)
        counts.accepted += sum(judged.is_accepted for judged in drawn)
        counts.kept += len(places.kept)
        counts.kept_outside += sum(not judged.is_accepted for judged in places.kept)
        self._kind_of.update((judged.task.task_id, judged.kind) for judged in places.kept)
        return [judged.task for judged in places.kept]

    def selecting(self, draw: Draw, *, version: int = 0, over_ranks: OverRanks = alone) -> Draw:
        """Return a draw whose tasks are selected, for dynamic sampling. It is a collective."""

        def draw_selected(wanted: Sequence[int]) -> Sequence[Task]:
            return self.select(draw(wanted), draw, version=version, over_ranks=over_ranks)

        return draw_selected

    def learn(
        self,
        groups: Sequence[RolloutGroup],
        *,
        gather: Callable[[list[int]], list[list[int]]] = lambda own: [own],
    ) -> None:
        """Let the kinds observe the groups of the selected tasks. A collective if kinds are preferred.

        Args:
            groups: All groups of this rank that were rolled out in the step.
            gather: Gathers one list of numbers from each rank.
        """
        if self.kinds is not None:
            size = num_kinds()
            counts = [0] * (2 * size)  # groups with a gradient, and all groups
            for group in groups:
                kind = self._kind_of[group.task.task_id]
                counts[kind] += group.is_live
                counts[size + kind] += 1
            summed = [sum(numbers) for numbers in zip(*gather(counts), strict=True)]
            self.kinds.observe(summed[:size], summed[size:])
        self._kind_of.clear()

    def take_counts(self) -> SelectionCounts:
        """Return this rank's counts since the last call."""
        counts, self._counts = self._counts, SelectionCounts()
        return counts

    def _judge(self, tasks: Sequence[Task], version: int) -> list[_Judged]:
        return [
            self._judged(task, chance, version) for task, chance in zip(tasks, self.score(tasks), strict=True)
        ]

    def _judged(self, task: Task, chance: Chance, version: int) -> _Judged:
        is_in_band = self.settings.has_in_band(chance.true_prob)
        kind = kind_of(chance.true_prob, chance.entropy)
        is_accepted = is_in_band and (
            self.kinds is None
            or task_uniform(self.seed, version, task.task_id) < self.kinds.accept_prob(kind)
        )
        return _Judged(task=task, is_in_band=is_in_band, is_accepted=is_accepted, kind=kind)
