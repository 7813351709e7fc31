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
    """Built on every rank together. Its methods are collectives, of one thread a rank at a time, and raise RanksEnded once one of the ranks has ended."""

    def __init__(self, ranks: Ranks) -> None:
        data_group, tensor_group = ranks.further_groups()
        self._data = _Channel(data_group, size=ranks.num_data)
        self._tensor = _Channel(tensor_group, size=ranks.num_tensor)
        self.data_rank = ranks.data_rank

    def gather(self, value: T) -> list[T]:
        """As ``Ranks.gather``."""
        return self._data.gather(value)

    def shared(self, work: Callable[[Sequence[T]], Sequence[R]]) -> Callable[[Sequence[T]], list[R]]:
        """As ``Ranks.shared``."""
        return shared_work(work, rank=self._tensor.rank, num_ranks=self._tensor.size, gather=self._tensor.gather)

    def end(self, reason: str | None) -> None:
        """Says that this rank takes part in nothing any more, because of an error or (None) because the run stops."""
        for channel in (self._tensor, self._data):
            channel.end(reason)


class _Channel:
    """One process group. Values travel with a note: empty, or why the sender ends."""

    def __init__(self, group: ProcessGroup | None, *, size: int) -> None:
        self.size = size
        self.rank = 0 if group is None else dist.get_rank(group)
        self._group = group
        self._has_ended = group is None

    def gather(self, value: T) -> list[T]:
        if self._group is None:
            return [value]
        rows = self._exchange(value, note="")
        notes = [f"rank {dist.get_global_rank(self._group, rank)}: {note}" for rank, (note, _) in enumerate(rows) if note]
        if notes:
            self._has_ended = True
            raise RanksEnded("rollouts in the background ended on another rank. " + "; ".join(notes))
        return [value for _, value in rows]

    def end(self, reason: str | None) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._exchange(None, note=reason or "the run stops")

    def _exchange(self, value: Any, *, note: str) -> list[tuple[str, Any]]:
        rows: list[Any] = [None] * self.size
        dist.all_gather_object(rows, (note, value), group=self._group)
        return rows
