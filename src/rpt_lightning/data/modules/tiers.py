"""An order of tasks from easy to hard, by tiers of the proxy's entropy (RMT, arXiv:2509.24375).

Every task of a step comes from a tier that is drawn with the step's probabilities. With ``t`` for the number
of steps before and ``T`` for ``steps``, these are ``first`` (p1) until 0.3 T and ``last`` (p2) from 0.7 T on.
In between they change linearly. Within a tier, tasks come in the shuffled order of stream.py, epoch after
epoch of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rpt_lightning.data.modules.random_draw import uniform
from rpt_lightning.data.modules.stream import TIERS, Order, Place, ShuffledOrder
from rpt_lightning.flag_bounds import check_number

FLAG = "--data.tiers"


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """An order of tasks from easy to hard (RMT).

    Args:
        bounds: Entropies in nats that divide the positions into tiers, ascending. A position belongs to the
            tier above the last bound that it exceeds. Without bounds, tasks come in a shuffled order.
        first: Probability of each tier, the easiest first, until 30 % of the steps.
        last: Probability of each tier from 70 % of the steps on.
        steps: Number of steps (batches of tasks) of the whole schedule, usually that of the run.
    """

    bounds: tuple[float, ...] = ()
    first: tuple[float, ...] = ()
    last: tuple[float, ...] = ()
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.bounds:
            if self.first or self.last or self.steps is not None:
                raise ValueError(
                    f"{FLAG}.bounds is not set, so there are no tiers to draw from; give the entropies that "
                    "divide them, such as [1.0, 1.5], or leave all of --data.tiers out"
                )
            return
        if not all(left < right for left, right in zip(self.bounds, self.bounds[1:], strict=False)):
            raise ValueError(f"{FLAG}.bounds {list(self.bounds)}: give entropies (nats) in ascending order")
        for name, shares in (("first", self.first), ("last", self.last)):
            if (
                len(shares) != len(self.bounds) + 1
                or any(not share >= 0 for share in shares)
                or not math.isclose(sum(shares), 1.0, abs_tol=1e-6)
            ):
                raise ValueError(
                    f"{FLAG}.{name} {list(shares)}: {len(self.bounds)} bounds make {len(self.bounds) + 1} "
                    "tiers, so give that many probabilities, which sum to 1"
                )
        if self.steps is None:
            raise ValueError(
                f"{FLAG}.bounds {list(self.bounds)}: tiers change over {FLAG}.steps, which is not set; give "
                "the run's number of steps, as in --trainer.max_steps"
            )
        check_number(f"{FLAG}.steps", self.steps, least=1)

    @property
    def are_set(self) -> bool:
        """Whether there are tiers."""
        return bool(self.bounds)

    def probabilities(self, step: int) -> tuple[float, ...]:
        """Return each tier's probability in the step that comes after ``step`` others.

        >>> tiers = Tiers(bounds=(1.0,), first=(0.75, 0.25), last=(0.25, 0.75), steps=10)
        >>> [tiers.probabilities(step)[0] for step in (0, 3, 5, 7, 10)]
        [0.75, 0.75, 0.5, 0.25, 0.25]
        """
        assert self.steps is not None
        # (step / steps - 0.3) / (0.7 - 0.3), in whole numbers as long as possible
        progress = min(1.0, max(0.0, (10 * step - 3 * self.steps) / (4 * self.steps)))
        return tuple(
            (1 - progress) * first + progress * last
            for first, last in zip(self.first, self.last, strict=True)
        )

    def of(self, entropy: NDArray[np.float32]) -> NDArray[np.intp]:
        """Return the tier of each position, from 0. [P] -> [P]."""
        return np.digitize(entropy, self.bounds, right=True)

    def words(self, tier: int) -> str:
        """Describe a tier.

        >>> Tiers(bounds=(1.0, 1.5), first=(1, 0, 0), last=(0, 0, 1), steps=1).words(1)
        'tier 2 of 3 (entropy above 1.0 and up to 1.5 nats)'
        """
        edges = [f"above {self.bounds[tier - 1]}"] if tier else []
        edges += [f"up to {self.bounds[tier]}"] if tier < len(self.bounds) else []
        return f"tier {tier + 1} of {len(self.bounds) + 1} (entropy {' and '.join(edges)} nats)"


@dataclass(frozen=True, slots=True)
class TieredPlace(Place):
    """A place in an order by tiers: ``index`` tasks are taken in all, ``taken`` of each tier.

    ``step`` counts the steps that have begun.
    """

    step: int
    taken: tuple[int, ...]


class TieredOrder(Order):
    """An order of ``(document, k)`` pairs by tiers.

    It is a function of the seed, the step, and the numbers of tasks that were taken before. All of that is in
    a `TieredPlace`, so the order depends neither on ranks nor on resumption.

    Args:
        entropy: Entropy of the positions of each document, in nats. [D] arrays of [P]
        chunk_sizes: Number of documents in each chunk, in order. [C]
        tiers: The tiers.
        bundle_size: Number of positions of a document and a tier that are next to each other in the tier's
            own order.
        seed: Seed of the order.
        items_per_step: Number of tasks in a step.
        where: The folder, for messages.
    """

    def __init__(
        self,
        entropy: Sequence[NDArray[np.float32]],
        chunk_sizes: Sequence[int],
        tiers: Tiers,
        *,
        bundle_size: int,
        seed: int,
        items_per_step: int,
        where: str,
    ) -> None:
        counts = np.array([len(values) for values in entropy], np.int64)  # [D]
        super().__init__(
            num_documents=len(counts), items_per_epoch=int(counts.sum()), bundle_size=bundle_size, seed=seed
        )
        self.tiers = tiers
        documents = np.repeat(np.arange(len(counts)), counts)  # [P]
        items = np.concatenate([np.arange(count) for count in counts.tolist()])  # [P]
        of_position = tiers.of(np.concatenate(entropy))  # [P]
        self._orders: list[ShuffledOrder] = []
        self._items: list[NDArray[np.intp]] = []  # of each tier, document by document
        self._starts: list[NDArray[np.intp]] = []  # of each document in them
        for tier in range(len(tiers.bounds) + 1):
            is_in = of_position == tier
            num_items = np.bincount(documents[is_in], minlength=len(counts))  # [D]
            self._orders.append(
                ShuffledOrder(num_items.astype(np.int32), chunk_sizes, bundle_size=bundle_size, seed=seed)
            )
            self._items.append(items[is_in])
            self._starts.append(np.cumsum(num_items) - num_items)
        self._check_sizes(items_per_step, where)

    def _check_sizes(self, items_per_step: int, where: str) -> None:
        """Raise ValueError if a tier that is drawn has no tasks, or fewer than a step draws on average."""
        for tier, order in enumerate(self._orders):
            share = max(self.tiers.first[tier], self.tiers.last[tier])
            if share and not order.items_per_epoch:
                raise ValueError(
                    f"{FLAG}.bounds {list(self.tiers.bounds)}: {self.tiers.words(tier)} has no task in "
                    f"{where}, and its largest probability is {share:g}; move the bounds, or give it "
                    "probability 0 in first and last"
                )
            wanted = math.ceil(share * items_per_step - 1e-9)
            if wanted > order.items_per_epoch:
                raise ValueError(
                    f"--data.tasks_per_step {items_per_step}: {self.tiers.words(tier)} has only "
                    f"{order.items_per_epoch} tasks in {where}, and a step draws about {wanted} of it, so it "
                    f"would repeat some; lower it, or move {FLAG}.bounds"
                )

    @property
    def first(self) -> TieredPlace:
        """The place at which a run begins."""
        return TieredPlace(epoch=0, index=0, step=0, taken=(0,) * len(self._orders))

    def at_next_step(self, place: Place) -> TieredPlace:
        """Return the place with one more step begun."""
        place = _tiered(place)
        return replace(place, step=place.step + 1)

    def __getitem__(self, place: Place) -> tuple[int, int]:
        """Return the pair at a place."""
        place = _tiered(place)
        tier = self._tier(place)
        epoch, index = divmod(place.taken[tier], self._orders[tier].items_per_epoch)
        document, item = self._orders[tier][Place(epoch, index)]
        return document, int(self._items[tier][self._starts[tier][document] + item])

    def after(self, place: Place) -> TieredPlace:
        """Return the place with one more task taken."""
        place = _tiered(place)
        tier = self._tier(place)
        taken = tuple(count + (number == tier) for number, count in enumerate(place.taken))
        return replace(place, index=place.index + 1, taken=taken)

    def _tier(self, place: TieredPlace) -> int:
        """Return the tier of the next task."""
        shares = self.tiers.probabilities(max(0, place.step - 1))
        drawn, total = uniform(self.seed, f"tier of task {place.index}"), 0.0
        for tier, share in enumerate(shares):
            total += share
            if drawn < total:
                return tier
        # The shares may add up to a little less than 1.
        return max(tier for tier, share in enumerate(shares) if share)

    @property
    def settings(self) -> dict[str, int | str]:
        """What the order was made with."""
        tiers = self.tiers
        words = f"{list(tiers.bounds)}, {list(tiers.first)} to {list(tiers.last)} over {tiers.steps} steps"
        return super().settings | {TIERS: words}

    def stored(self, place: Place) -> dict[str, Any]:
        """Return a place in JSON types."""
        place = _tiered(place)
        return {"step": place.step, "taken": list(place.taken)}

    def restored(self, state: dict[str, Any]) -> TieredPlace:
        """Return a stored place."""
        taken = tuple(map(int, state["taken"]))
        return TieredPlace(epoch=0, index=sum(taken), step=int(state["step"]), taken=taken)


def _tiered(place: Place) -> TieredPlace:
    assert isinstance(place, TieredPlace), "every place of an order comes from it"
    return place
