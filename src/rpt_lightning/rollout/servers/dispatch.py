"""Assign requests to servers, and reassign the requests of a server that is lost.

Positions of one document go to one server, which computes their common prefix once. A document is split only
if it is more than one server's share of all completions. The next document goes to the server with the least
work. Whatever exceeds a server's room waits, so no server sits idle while another has a queue. A completion
depends on its request's seed and not on the server, so a lost request can simply be sent to another one.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, cast

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
    dispatcher = _Dispatcher(requests, room=room, on_lost=on_lost)
    try:
        while not dispatcher.is_finished:
            if not dispatcher.has_workers:
                dispatcher.begin_with(await find_workers())
            dispatcher.give_out()
            await dispatcher.settle_next()
        return dispatcher.samples_in_order()
    finally:
        await dispatcher.cancel()


@dataclass(frozen=True)
class _Job:
    """What a running task does: complete the request with this index, or watch the worker if it is None."""

    worker: Worker
    index: int | None


class _Dispatcher:
    """The requests that are completed, in progress and waiting, and the workers that are left."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        *,
        room: int,
        on_lost: Callable[[Worker, ServerLost], None],
    ) -> None:
        self._requests = requests
        self._room = room
        self._on_lost = on_lost
        self._samples: dict[int, list[Sample]] = {}
        self._failures: Counter[int] = Counter()  # failed tries of each request
        self._load: dict[Worker, int] = {}  # completions in progress
        self._running: dict[asyncio.Task[object], _Job] = {}
        self._waiting: deque[list[int]] = deque()

    @property
    def is_finished(self) -> bool:
        return len(self._samples) == len(self._requests)

    @property
    def has_workers(self) -> bool:
        return bool(self._load)

    def samples_in_order(self) -> list[list[Sample]]:
        return [self._samples[index] for index in range(len(self._requests))]

    def begin_with(self, workers: Sequence[Worker]) -> None:
        """Divide everything that is not completed anew among these workers."""
        for worker in workers:
            self._load[worker] = 0
            self._run(worker.watch(), _Job(worker, None))
        left = [index for index in range(len(self._requests)) if index not in self._samples]
        self._waiting = deque(_bundles(self._requests, left, len(self._load)))

    def give_out(self) -> None:
        """Give the next documents to the workers with the least work, as far as they have room."""
        while self._waiting:
            worker = min(self._load, key=lambda worker: self._load[worker])
            size = sum(self._requests[index].n for index in self._waiting[0])
            if self._load[worker] and self._load[worker] + size > self._room:
                break
            self._load[worker] += size
            for index in self._waiting.popleft():
                self._run(worker.generate(self._requests[index]), _Job(worker, index))

    async def settle_next(self) -> None:
        """Wait until something ends, and settle all that has ended."""
        done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
        # Successes come first, so what a worker finished before it was lost still counts.
        for task in sorted(done, key=lambda task: task.exception() is not None):
            if task not in self._running:  # its worker was lost a moment ago
                continue
            job, error = self._running.pop(task), task.exception()
            if error is None:
                self._complete(job, cast("list[Sample]", task.result()))
            elif isinstance(error, ServerLost):
                await self._lose(job, error)
            else:
                raise error

    async def cancel(self) -> None:
        await _cancel(self._running)

    def _run(self, work: Coroutine[Any, Any, object], job: _Job) -> None:
        self._running[asyncio.ensure_future(work)] = job

    def _complete(self, job: _Job, samples: list[Sample]) -> None:
        assert job.index is not None, "a watch never returns"
        self._samples[job.index] = samples
        self._load[job.worker] -= self._requests[job.index].n

    async def _lose(self, job: _Job, error: ServerLost) -> None:
        """Let the other workers complete what the job's worker has in progress, before everything else."""
        self._on_lost(job.worker, error)
        if job.index is not None:
            self._count_failure(job.index, error)
        del self._load[job.worker]
        orphans = {task: other for task, other in self._running.items() if other.worker is job.worker}
        for task in orphans:
            del self._running[task]
        await _cancel(orphans)
        lost = sorted(lost.index for lost in (job, *orphans.values()) if lost.index is not None)
        bundles = list(_bundles(self._requests, lost, max(len(self._load), 1)))
        self._waiting.extendleft(reversed(bundles))

    def _count_failure(self, index: int, error: ServerLost) -> None:
        self._failures[index] += 1
        if self._failures[index] == MOST_TRIES:
            raise EngineLost(
                f"{self._requests[index].task_id}: a server failed at each of {MOST_TRIES} "
                f"tries, the last with: {error}"
            )


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
