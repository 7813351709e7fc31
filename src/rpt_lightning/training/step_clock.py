"""Measures the seconds of each phase of a step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rpt_lightning.metrics.registry import registered


class StepClock:
    """A clock of phases. They must not overlap, so that they add up to the step.

    >>> clock = StepClock()
    >>> with clock.phase("pack"):
    ...     pass
    >>> sorted(clock.take()), sorted(clock.take())
    (['time/pack_s'], [])
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._start_s: float | None = None

    def begin(self) -> None:
        """Begin the step, unless another callback has begun it already."""
        if self._start_s is None:
            self._start_s = time.perf_counter()

    def end(self) -> None:
        """End the step, if one has begun."""
        self._start_s = None

    @property
    def start_s(self) -> float:
        """When the step began, on the clock of ``time.perf_counter``, in seconds."""
        assert self._start_s is not None, "no step has begun"
        return self._start_s

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``time/{name}_s``, which must be registered."""
        metric = registered(f"time/{name}_s").name
        start = time.perf_counter()
        yield
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # Otherwise a phase would end before its kernels do, and the next phase would be charged for them.
            torch.cuda.synchronize()
        self._seconds[metric] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
