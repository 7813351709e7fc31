"""What one rank does for all: servers are shared by the ranks of a run, so the first one speaks to them where speaking twice would do harm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from rpt_lightning.rollout.engine import EngineLost

T = TypeVar("T")


def on_first_rank(work: Callable[[], T], *, meanwhile: Callable[[], None] = lambda: None) -> T:
    """Runs ``work`` on rank 0 and returns its result on every rank (a collective).

    An error on rank 0 is raised on every rank, EngineLost as itself: the others must not wait in a later collective for one that gave up.

    Args:
        work: Its result must be a plain Python value.
        meanwhile: Runs on the other ranks, to take part in collectives of ``work``.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return work()
    error: Exception | None = None
    outcome: list[Any] = [
        None,
        None,
        RuntimeError,
    ]  # result, text of the error, what it is to the other ranks
    try:
        if dist.get_rank() == 0:
            outcome[0] = work()
        else:
            meanwhile()
    except Exception as caught:
        error = caught
        outcome[1:] = [
            f"{type(caught).__name__}: {caught}",
            EngineLost if isinstance(caught, EngineLost) else RuntimeError,
        ]
    dist.broadcast_object_list(outcome, src=0)  # type: ignore[no-untyped-call, unused-ignore]
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise outcome[2](f"rank 0: {outcome[1]}")
    return cast(T, outcome[0])


def is_first_rank() -> bool:
    """Also true where there is one process only."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
