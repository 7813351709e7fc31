from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpt_lightning.rollout.engines.base import EngineLost, Sample
from rpt_lightning.rollout.servers.dispatch import MOST_TRIES, dispatch
from rpt_lightning.rollout.servers.server import ServerLost
from rpt_lightning.types import GenerationRequest, SamplingSettings

SAMPLING = SamplingSettings(temperature=1.0, max_tokens=1, stop_token_ids=())


class Scripted:
    """A worker that answers after a random number of turns of the event loop.

    It is lost at its ``dies_at``-th request, or when the watch says so.
    """

    def __init__(
        self, name: str, numbers: random.Random, *, dies_at: int | None = None, is_caught: bool = False
    ) -> None:
        self.name, self._numbers, self._dies_at, self._is_caught = name, numbers, dies_at, is_caught
        self.asked: list[str] = []
        self.under_way = self.most_under_way = 0

    async def generate(self, request: GenerationRequest) -> list[Sample]:
        self.asked.append(request.task_id)
        self.under_way += request.n
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            dies = self._dies_at is not None and len(self.asked) >= self._dies_at
            for _ in range(self._numbers.randrange(1, 6)):
                await asyncio.sleep(0)
            if dies and not self._is_caught:
                raise ServerLost(f"{self.name} died")
            return [Sample((request.seed + index,), (-1.0,)) for index in range(request.n)]
        finally:
            self.under_way -= request.n

    async def watch(self) -> NoReturn:
        while not (self._is_caught and self._dies_at is not None and len(self.asked) >= self._dies_at):
            await asyncio.sleep(0)
        raise ServerLost(f"{self.name} hangs")


def make_requests(documents: list[int], n: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            task_id=f"doc:{document}:{position}",
            doc_id=f"doc:{document}",
            prompt_ids=(1,),
            n=n,
            seed=1000 * document + 10 * position,
            sampling=SAMPLING,
        )
        for document, num_positions in enumerate(documents)
        for position in range(num_positions)
    ]


def run(requests, groups, *, room, lost):
    waves = iter(groups)

    async def find():
        return next(waves)

    return asyncio.run(
        dispatch(requests, find, room=room, on_lost=lambda worker, error: lost.append(worker.name))
    )


@settings(max_examples=100, deadline=None)
@given(
    documents=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    n=st.integers(1, 4),
    room=st.integers(1, 20),
    deaths=st.lists(
        st.one_of(st.none(), st.tuples(st.integers(1, 4), st.booleans())), min_size=1, max_size=4
    ),
    seed=st.integers(0, 2**16),
)
def test_every_request_is_answered_once_whatever_dies(documents, n, room, deaths, seed) -> None:
    numbers = random.Random(seed)
    requests = make_requests(documents, n)
    mortal = [
        Scripted(f"m{i}", numbers, dies_at=death and death[0], is_caught=bool(death and death[1]))
        for i, death in enumerate(deaths)
    ]
    lost: list[str] = []
    rows = run(requests, [mortal, [Scripted("later", numbers)]], room=room, lost=lost)
    assert [[sample.token_ids[0] for sample in row] for row in rows] == [
        [r.seed + i for i in range(n)] for r in requests
    ]
    assert set(lost) <= {worker.name for worker in mortal if worker._dies_at is not None}
    assert max(Counter(lost).values(), default=0) <= 1


def test_a_document_stays_on_one_server_and_all_servers_work() -> None:
    numbers = random.Random(0)
    workers = [Scripted(f"w{i}", numbers) for i in range(3)]
    run(make_requests([4, 4, 4, 4, 4, 4], 2), [workers], room=8, lost=[])
    assert sorted(len(worker.asked) for worker in workers) == [8, 8, 8]
    owners = {task_id.split(":")[1]: worker.name for worker in workers for task_id in worker.asked}
    assert all(owners[task_id.split(":")[1]] == worker.name for worker in workers for task_id in worker.asked)
    assert all(worker.most_under_way <= 8 for worker in workers)


def test_one_large_document_is_shared_out() -> None:
    numbers = random.Random(0)
    workers = [Scripted(f"w{i}", numbers) for i in range(4)]
    run(make_requests([16], 8), [workers], room=1000, lost=[])
    assert [len(worker.asked) for worker in workers] == [4, 4, 4, 4]


def test_a_request_that_every_server_fails_at_is_not_asked_for_ever() -> None:
    class Failing(Scripted):
        async def generate(self, request: GenerationRequest) -> list[Sample]:
            self.asked.append(request.task_id)
            raise ServerLost("status 500")

    worker = Failing("f", random.Random(0))
    with pytest.raises(
        EngineLost,
        match=rf"doc:0:0: a server failed at each of {MOST_TRIES} tries, the last with: status 500",
    ):
        run(make_requests([1], 1), [[worker]] * (MOST_TRIES + 1), room=8, lost=[])
    assert len(worker.asked) == MOST_TRIES


def test_another_error_ends_it() -> None:
    class Refusing(Scripted):
        async def generate(self, request: GenerationRequest) -> list[Sample]:
            raise ValueError("n is too large for this server")

    with pytest.raises(ValueError, match="too large"):
        run(make_requests([2], 1), [[Refusing("r", random.Random(0))]], room=8, lost=[])


def test_requests_of_no_document_are_divided_one_by_one() -> None:
    numbers = random.Random(0)
    workers = [Scripted(f"w{i}", numbers) for i in range(3)]
    requests = [replace(request, doc_id=None) for request in make_requests([12], 2)]
    run(requests, [workers], room=2, lost=[])
    assert all(worker.most_under_way <= 2 for worker in workers)
    assert all(worker.asked for worker in workers)
