"""Work that one rank does for all, because the ranks share servers and some calls must happen only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from rpt_lightning.rollout.engines.base import EngineLost

T = TypeVar("T")


def on_first_rank(work: Callable[[], T], *, meanwhile: Callable[[], None] = lambda: None) -> T:
    """Run ``work`` on rank 0 and return its result on every rank. A collective.

    An error on rank 0 is raised on every rank, so that no rank waits in a later collective for one that gave
    up. EngineLost stays an EngineLost on every rank.

    Args:
        work: Returns a plain Python value.
        meanwhile: Runs on the other ranks, to take part in the collectives of ``work``.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return work()
    error: Exception | None = None
    outcome: list[Any] = [None, None, RuntimeError]  # result, text of the error, its class on other ranks
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
    """Return whether this is rank 0 or the only process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
