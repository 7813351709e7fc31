"""Ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Ranks:
    """Collectives for ranks that are threads.

    A collective that only one rank calls breaks the barrier, where real ranks would hang.
    """

    def __init__(self, num_ranks: int) -> None:
        self.barrier, self.said = threading.Barrier(num_ranks, timeout=5), [0] * num_ranks

    def run(self, work: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(self.said))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def all_gather(self, rank: int, number: int) -> list[int]:
        self.said[rank] = number
        self.barrier.wait()
        numbers = list(self.said)
        self.barrier.wait()
        return numbers
