"""Collectives between ranks that generate in the background.

They use process groups of their own, since the main thread uses those of training.

A background thread may end at any moment, because its rank stops or its rollouts failed. The threads of the
other ranks must not wait for it forever. So the last thing that a thread does is to take part in the others'
next exchange and announce that it ends. Each thread that receives this ends too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from rpt_lightning.training.distributed.ranks import Ranks, shared_work

T = TypeVar("T")
R = TypeVar("R")


class RanksEnded(RuntimeError):
    """The background thread of another rank ended."""


class RankExchange:
    """Collectives for one thread per rank at a time. They raise RanksEnded once a rank has ended."""

    def __init__(self, data: Channel, tensor: Channel) -> None:
        self._data = data
        self._tensor = tensor

    @classmethod
    def over(cls, ranks: Ranks) -> RankExchange:
        """Create it over new process groups of these ranks. A collective."""
        data, tensor = ranks.further_groups()
        return cls(Channel.over(data), Channel.over(tensor))

    @property
    def data_rank(self) -> int:
        return self._data.rank

    def gather(self, value: T) -> list[T]:
        """Like ``Ranks.gather``."""
        return self._data.gather(value)

    def gather_parts(self, value: T) -> list[T]:
        """Like ``Ranks.gather_parts``."""
        return self._tensor.gather(value)

    def any(self, flag: bool) -> bool:
        """Like ``Ranks.any``."""
        return any(self._tensor.gather(any(self._data.gather(flag))))

    def shared(self, work: Callable[[Sequence[T]], Sequence[R]]) -> Callable[[Sequence[T]], list[R]]:
        """Like ``Ranks.shared``."""
        return shared_work(
            work, rank=self._tensor.rank, num_ranks=self._tensor.size, gather=self._tensor.gather
        )

    def end(self, reason: str | None) -> None:
        """Announce that this rank takes part in no further exchange.

        Args:
            reason: The error that ends it, or None if the run stops.
        """
        for channel in (self._tensor, self._data):
            channel.end(reason or "the run stops")


class Channel:
    """A group of ranks. Each value travels with a note, which is empty or says why the sender ends.

    Args:
        all_gather: Gathers one object from each rank, in rank order.
        rank: Index of this rank in the group.
        size: Number of ranks in the group.
    """

    def __init__(self, all_gather: Callable[[Any], list[Any]], *, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._all_gather = all_gather
        self._has_ended = False

    @classmethod
    def over(cls, group: ProcessGroup | None) -> Channel:
        """Create it over a process group. None: this process alone."""
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
