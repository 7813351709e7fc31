"""Check a user-defined reward and what it returns.

A single error names the class, what it returned, and what is wanted.
"""

from __future__ import annotations

import inspect
import math
from numbers import Real
from typing import Any

from rpt_lightning.objectives.rewards.next_token import Reward

WANTED = "wanted: one number per completion, such as (1.0, 0.0)"


def check_reward(reward: Reward) -> None:
    """Check a reward before anything is generated. Raises ValueError if it is not usable."""
    signature = inspect.signature(reward.group_rewards)
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            f"the reward {type(reward).__name__} has group_rewards{signature}, "
            f"which cannot be called with one argument, an AnsweredTask ({error}); {WANTED}"
        ) from error


def checked_rewards(reward: object, returned: Any, *, num: int, task_id: str) -> tuple[float, ...]:
    """Check the values that a reward returned for the ``num`` predictions of a task.

    Raises ValueError unless they are one finite number per prediction.
    """
    where = f"the reward {type(reward).__name__} returned"
    of = f"for the {num} predictions of task {task_id!r}; {WANTED}"
    if not isinstance(returned, (tuple, list)):
        raise ValueError(f"{where} {_said(returned)} {of}")
    if len(returned) != num:
        raise ValueError(f"{where} {len(returned)} values {of}")
    for value in returned:
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{where} {_said(value)} among the values {of}, and finite")
    return tuple(float(value) for value in returned)


def _said(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
