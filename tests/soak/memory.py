"""Resident memory of every process of a run over time, and whether it stays where it is."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import psutil

_EVERY_S = 2.0
_WARM_UP_S = 60.0  # imports, first steps, and what allocators keep from them
_LEAST_S = 120.0  # shorter lives say nothing
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Of one life of one process, between the first and the last quarter of it (medians), after its warm-up."""

    name: str
    life_s: float
    first_mib: float
    last_mib: float

    @property
    def is_flat(self) -> bool:
        return self.last_mib <= 1.05 * self.first_mib + 16


class MemoryLog:
    def __init__(self) -> None:
        self._rows: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(
            list
        )  # (name, pid): seconds, MiB
        self._last_s = 0.0

    def sample(self, find: Callable[[], dict[str, psutil.Process]]) -> None:
        """Call it as often as you like: now and then it asks for the processes, by name, and looks at them."""
        now = time.monotonic()
        if now - self._last_s < _EVERY_S:
            return
        self._last_s = now
        for name, process in find().items():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._rows[name, process.pid].append((now, process.memory_info().rss / _MIB))

    def growths(self) -> list[Growth]:
        """Of every life that was long enough."""
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
