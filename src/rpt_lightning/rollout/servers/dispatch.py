"""Assign requests to servers, and reassign the requests of a server that is lost.

Positions of one document go to one server, which computes their common prefix once. A document is split only
if it is more than one server's share of all completions. The next document goes to the server with the least
work. Whatever exceeds a server's room waits, so no server sits idle while another has a queue. A completion
depends on its request's seed and not on the server, so a lost request can simply be sent to another one.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NoReturn, Protocol, cast

from rpt_lightning.rollout.engines.base import EngineLost, Sample
from rpt_lightning.rollout.servers.server import ServerLost
from rpt_lightning.types import GenerationRequest

MOST_TRIES = 10  # per request; without a limit, servers that fail at once could be asked forever


class Worker(Protocol):
    """A server that holds the right weights."""

    async def generate(self, request: GenerationRequest) -> list[Sample]:
        """Return all completions of a request, or raise ServerLost."""

    async def watch(self) -> NoReturn:
        """Raise ServerLost as soon as the server must not be used any more."""


async def dispatch(
    requests: Sequence[GenerationRequest],
    find_workers: Callable[[], Awaitable[Sequence[Worker]]],
    *,
    room: int,
    on_lost: Callable[[Worker, ServerLost], None],
) -> list[list[Sample]]:
    """Return the completions of every request, in the order of the requests.

    Args:
        requests: The requests, with positions of one document next to each other.
        find_workers: Returns the workers. It is called at the start and whenever no worker is left. It waits
            for a worker or raises.
        room: Number of completions that one worker is given at a time. A larger document goes to a worker
            that has nothing else to do.
        on_lost: Called with every worker that is lost.

    Raises:
        EngineLost: No worker completes one of the requests.
    """
    samples: dict[int, list[Sample]] = {}
    failures: Counter[int] = Counter()  # failed tries of each request
    load: dict[Worker, int] = {}  # completions in progress
    # The value holds the index of a request, or None if the task watches the worker.
    running: dict[asyncio.Task[object], tuple[Worker, int | None]] = {}
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
            # Successes come first, so what a worker finished before it was lost still counts.
            for task in sorted(done, key=lambda task: task.exception() is not None):
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
                                f"{requests[done_index].task_id}: a server failed at each of {MOST_TRIES} "
                                f"tries, the last with: {error}"
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
    """Group the requests of each document, and split groups that exceed one worker's share."""
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
