"""Which server completes which request, and what becomes of the requests of a server that is lost.

Positions of one document go to one server, which computes their common prefix once. A document is split only where it is more than a server's
share of all completions. The next document goes to the server that has least to do; what exceeds a server's room waits, so that no server sits idle
beside another's queue. A completion depends on its request's seed, not on the server, so a lost request is simply asked again elsewhere.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NoReturn, Protocol, cast

from rpt_lightning.rollout.engine import EngineLost, Sample
from rpt_lightning.rollout.server import ServerLost
from rpt_lightning.types import GenerationRequest

MOST_TRIES = 10  # of a request: servers that answer with an error at once could be asked for ever


class Worker(Protocol):
    """A server that holds the right weights."""

    async def generate(self, request: GenerationRequest) -> list[Sample]:
        """All completions of a request, or ServerLost."""

    async def watch(self) -> NoReturn:
        """Ends with ServerLost when the server must not be used any more."""


async def dispatch(
    requests: Sequence[GenerationRequest],
    find_workers: Callable[[], Awaitable[Sequence[Worker]]],
    *,
    room: int,
    on_lost: Callable[[Worker, ServerLost], None],
) -> list[list[Sample]]:
    """The completions of every request, in the order of the requests.

    Args:
        requests: Positions of a document next to each other.
        find_workers: Asked at the beginning, and again whenever no worker is left; waits for one, or raises.
        room: Completions that one worker is given at a time (a document that is larger goes to a worker with nothing else to do).
        on_lost: Told of every worker that is lost.

    Raises:
        EngineLost: A request that no worker completes.
    """
    samples: dict[int, list[Sample]] = {}
    failures: Counter[int] = Counter()  # of each request's own tries
    load: dict[Worker, int] = {}  # completions under way
    running: dict[
        asyncio.Task[object], tuple[Worker, int | None]
    ] = {}  # a request's index; None: the watch over the worker
    waiting: deque[list[int]] = deque()
    try:
        while len(samples) < len(requests):
            if not load:
                for worker in await find_workers():
                    load[worker] = 0
                    running[asyncio.ensure_future(worker.watch())] = (worker, None)
                waiting = deque(
                    _bundles(
                        requests, (index for index in range(len(requests)) if index not in samples), len(load)
                    )
                )
            while waiting:
                worker = min(load, key=lambda worker: load[worker])
                size = sum(requests[index].n for index in waiting[0])
                if load[worker] and load[worker] + size > room:
                    break
                load[worker] += size
                for index in waiting.popleft():
                    running[asyncio.ensure_future(worker.generate(requests[index]))] = (worker, index)
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(
                done, key=lambda task: task.exception() is not None
            ):  # what a worker finished before it was lost counts
                if task not in running:
                    continue
                worker, done_index = running.pop(task)
                error = task.exception()
                if isinstance(error, ServerLost):
                    on_lost(worker, error)
                    if done_index is not None:
                        failures[done_index] += 1
                        if failures[done_index] == MOST_TRIES:
                            raise EngineLost(
                                f"{requests[done_index].task_id}: a server failed at each of {MOST_TRIES} tries, the last with: {error}"
                            )
                    del load[worker]
                    orphans = [task for task, (owner, _) in running.items() if owner is worker]
                    lost = [done_index, *(running.pop(task)[1] for task in orphans)]
                    await _cancel(orphans)
                    waiting.extendleft(
                        reversed(
                            list(
                                _bundles(
                                    requests,
                                    sorted(index for index in lost if index is not None),
                                    max(len(load), 1),
                                )
                            )
                        )
                    )
                elif error is not None:
                    raise error
                else:
                    assert done_index is not None
                    samples[done_index] = cast("list[Sample]", task.result())
                    load[worker] -= requests[done_index].n
        return [samples[index] for index in range(len(requests))]
    finally:
        await _cancel(running)


def _bundles(
    requests: Sequence[GenerationRequest], indices: Iterable[int], num_workers: int
) -> Iterable[list[int]]:
    """Requests of the same document together, split where they are more than a worker's share."""
    documents: dict[str | int, list[int]] = {}
    for index in indices:
        doc_id = requests[index].doc_id
        documents.setdefault(index if doc_id is None else doc_id, []).append(index)
    share = -(-sum(requests[index].n for document in documents.values() for index in document) // num_workers)
    for document in documents.values():
        bundle: list[int] = []
        size = 0
        for index in document:
            if bundle and size + requests[index].n > share:
                yield bundle
                bundle, size = [], 0
            bundle.append(index)
            size += requests[index].n
        yield bundle


async def _cancel(tasks: Iterable[asyncio.Task[object]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
