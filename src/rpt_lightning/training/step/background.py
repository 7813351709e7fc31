"""A single thread beside the trainer's that runs jobs one after the other.

It is not a `ThreadPoolExecutor`. That joins its threads when the interpreter exits, and a job that hangs must
not keep a run from ending.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
# Time limit for ``at_end``. If it takes longer (another rank does not answer) the thread is abandoned.
_END_S = 5.0


class Background(Generic[T]):
    """Runs jobs in one thread. After a job fails no further job runs: later jobs fail with the same error.

    Args:
        name: Name of the thread.
        device: Device that jobs compute on by default. A new thread would otherwise take the first GPU.
        at_end: Called in the thread once no job will run any more. Its argument says what went wrong, or is
            None if the object was closed.
    """

    def __init__(self, name: str, *, device: torch.device, at_end: Callable[[str | None], None]) -> None:
        self._jobs: SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = SimpleQueue()
        self._device = device
        self._at_end = at_end
        self._is_closed = False
        self._error: BaseException | None = None
        self._is_quiet = threading.Event()  # no job runs or will run
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Queue a job. The future raises whatever the job raised, with the traceback of where it happened."""
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def close(self, *, limit_s: float) -> bool:
        """Start no further job and wait for the running one. May be called twice.

        Args:
            limit_s: Longest wait in seconds.

        Returns:
            Whether the running job has ended.
        """
        self._is_closed = True
        self._jobs.put(None)
        is_quiet = self._is_quiet.wait(limit_s)
        self._thread.join(_END_S if is_quiet else 0)
        return is_quiet

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (item := self._jobs.get()) is not None:
            future, job = item
            if self._error is not None:
                future.set_exception(self._error)
            elif self._is_closed:
                future.cancel()
            else:
                try:
                    future.set_result(job())
                except BaseException as error:
                    self._error = error
                    self._is_quiet.set()
                    future.set_exception(error)
                    self._at_end(None if self._is_closed else f"{type(error).__name__}: {error}")
        if self._error is None:
            self._is_quiet.set()
            self._at_end(None)
