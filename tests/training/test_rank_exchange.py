"""Ranks that generate in the background end together.

It does not matter which one ends first and where the others are. Here ranks are threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rpt_lightning.training.distributed.rank_exchange import Channel, RankExchange, RanksEnded


class Group:
    """A rank that enters a collective alone breaks the barrier. Real ranks would hang."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.values = size, threading.Barrier(size, timeout=10), [None] * size

    def channel(self, rank: int) -> Channel:
        def all_gather(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            values = list(self.values)
            self.barrier.wait()
            return values

        return Channel(all_gather, rank=rank, size=self.size)


def exchanges(num_data: int, num_tensor: int) -> list[RankExchange]:
    data, tensor = [Group(num_data) for _ in range(num_tensor)], [Group(num_tensor) for _ in range(num_data)]
    return [
        RankExchange(data[t].channel(d), tensor[d].channel(t))
        for d in range(num_data)
        for t in range(num_tensor)
    ]


def on_threads(ranks: list[RankExchange], work: Callable[[int, RankExchange], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [
            future.result()
            for future in [pool.submit(work, number, rank) for number, rank in enumerate(ranks)]
        ]


def test_values_and_work_are_shared() -> None:
    def work(number: int, rank: RankExchange) -> Any:
        return (
            rank.gather(number),
            rank.shared(lambda items: [item * 10 for item in items])([1, 2, 3]),
            rank.data_rank,
        )

    tens = [10, 20, 30]
    assert on_threads(exchanges(2, 2), work) == [
        ([0, 2], tens, 0),
        ([1, 3], tens, 0),
        ([0, 2], tens, 1),
        ([1, 3], tens, 1),
    ]
    assert on_threads(exchanges(1, 1), work) == [([0], tens, 0)]


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2), (3, 2)])
@pytest.mark.parametrize("point", [0, 1, 2, 5])
def test_all_end_with_the_one_that_fails(shape: tuple[int, int], point: int) -> None:
    """Rank 1 fails before its exchange number ``point``; exchanges of both kinds take turns."""
    num_ranks = shape[0] * shape[1]

    def work(number: int, rank: RankExchange) -> str | None:
        try:
            for turn in range(20):
                if number == 1 and turn == point:
                    raise MemoryError("no room")
                rank.gather(turn) if turn % 2 else rank.shared(list)([turn])
        except (RanksEnded, MemoryError) as error:
            rank.end(str(error))
            return str(error)
        return None

    said = on_threads(exchanges(*shape), work)
    assert len(said) == num_ranks
    assert all(text is not None and "no room" in text for text in said)


def test_a_rank_that_stops_frees_one_that_waits_for_it() -> None:
    def work(number: int, rank: RankExchange) -> str:
        said = "nothing to do"
        if number == 0:
            with pytest.raises(RanksEnded) as raised:
                rank.gather(number)
            said = str(raised.value)
        rank.end(None)
        rank.end(None)  # once is enough
        return said

    assert on_threads(exchanges(2, 1), work) == [
        "rollouts in the background ended on another rank: the run stops (rank 1 of 2)",
        "nothing to do",
    ]
