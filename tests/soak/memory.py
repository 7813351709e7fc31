"""The resident memory of every process of a run over time, and whether it stays flat."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import psutil

_EVERY_S = 2.0
_WARM_UP_S = 60.0  # imports, first steps, and memory that allocators keep from them
_LEAST_S = 120.0  # shorter lives say nothing
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The memory growth of one process in one life.

    ``first_mib`` and ``last_mib`` are medians over the first and the last quarter of the life after its
    warm-up.
    """

    name: str
    life_s: float
    first_mib: float
    last_mib: float

    @property
    def is_flat(self) -> bool:
        return self.last_mib <= 1.05 * self.first_mib + 16


class MemoryLog:
    def __init__(self) -> None:
        # (name, pid) -> pairs of seconds and MiB
        self._rows: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
        self._last_s = 0.0

    def sample(self, find: Callable[[], dict[str, psutil.Process]]) -> None:
        """Sample the memory of the processes that ``find`` returns by name.

        You may call it as often as you like. It samples only every few seconds.
        """
        now = time.monotonic()
        if now - self._last_s < _EVERY_S:
            return
        self._last_s = now
        for name, process in find().items():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._rows[name, process.pid].append((now, process.memory_info().rss / _MIB))

    def growths(self) -> list[Growth]:
        """Return the growth of every life that was long enough."""
        return [
            growth for (name, _), rows in self._rows.items() if (growth := growth_of(name, rows)) is not None
        ]


def growth_of(name: str, rows: list[tuple[float, float]]) -> Growth | None:
    start_s = rows[0][0]
    settled = [mib for at_s, mib in rows if at_s - start_s >= _WARM_UP_S]
    life_s = rows[-1][0] - start_s
    if life_s < _LEAST_S:
        return None
    quarter = max(1, len(settled) // 4)
    first, last = statistics.median(settled[:quarter]), statistics.median(settled[-quarter:])
    return Growth(name=name, life_s=life_s, first_mib=first, last_mib=last)
