"""What ranks tell each other while they generate in the background, over process groups of their own: those of training are in use by the main thread.

A background thread may end at any moment: its rank stops, or its rollouts failed. The threads of the other ranks must not wait for it forever, so the
last thing that a thread does is to take part in the others' next exchange with the word that it ends, and each that hears it ends too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from rpt_lightning.training.ranks import Ranks, shared_work

T = TypeVar("T")
R = TypeVar("R")


class RanksEnded(RuntimeError):
    """Another rank's thread ended."""


class RankExchange:
    """Its methods are collectives of one thread a rank at a time, and raise RanksEnded once one of the ranks has ended."""

    def __init__(self, data: Channel, tensor: Channel) -> None:
        self._data = data
        self._tensor = tensor

    @classmethod
    def over(cls, ranks: Ranks) -> RankExchange:
        """Over new process groups of these ranks. A collective."""
        data, tensor = ranks.further_groups()
        return cls(Channel.over(data), Channel.over(tensor))

    @property
    def data_rank(self) -> int:
        return self._data.rank

    def gather(self, value: T) -> list[T]:
        """As ``Ranks.gather``."""
        return self._data.gather(value)

    def gather_parts(self, value: T) -> list[T]:
        """As ``Ranks.gather_parts``."""
        return self._tensor.gather(value)

    def any(self, flag: bool) -> bool:
        """As ``Ranks.any``."""
        return any(self._tensor.gather(any(self._data.gather(flag))))

    def shared(self, work: Callable[[Sequence[T]], Sequence[R]]) -> Callable[[Sequence[T]], list[R]]:
        """As ``Ranks.shared``."""
        return shared_work(
            work, rank=self._tensor.rank, num_ranks=self._tensor.size, gather=self._tensor.gather
        )

    def end(self, reason: str | None) -> None:
        """Says that this rank takes part in nothing any more, because of an error or (None) because the run stops."""
        for channel in (self._tensor, self._data):
            channel.end(reason or "the run stops")


class Channel:
    """Some ranks. Values travel with a note: empty, or why the sender ends.

    Args:
        all_gather: One object of each rank, in their order.
        rank: This one's place among them.
        size: How many they are.
    """

    def __init__(self, all_gather: Callable[[Any], list[Any]], *, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._all_gather = all_gather
        self._has_ended = False

    @classmethod
    def over(cls, group: ProcessGroup | None) -> Channel:
        """Over a process group; None: alone."""
        if group is None:
            return cls(lambda value: [value], rank=0, size=1)

        def all_gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(values, value, group=group)
            return values

        return cls(all_gather, rank=dist.get_rank(group), size=dist.get_world_size(group))

    def gather(self, value: T) -> list[T]:
        rows = self._all_gather(("", value))
        notes = [f"{note} (rank {rank} of {self.size})" for rank, (note, _) in enumerate(rows) if note]
        if notes:
            self._has_ended = True
            raise RanksEnded("rollouts in the background ended on another rank: " + "; ".join(notes))
        return [value for _, value in rows]

    def end(self, reason: str) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._all_gather((reason, None))
