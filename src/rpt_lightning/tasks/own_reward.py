"""Check a user-defined reward and what it returns.

A single error names the class, what it returned, and what is wanted.
"""

from __future__ import annotations

import inspect
import math
from numbers import Real
from typing import Any

from rpt_lightning.tasks.reward import Reward

WANTED = (
    "wanted: group_rewards(predictions, task, first_token_probs) -> "
    "one number per prediction, such as (1.0, 0.0)"
)


def check_reward(reward: Reward) -> None:
    """Check a reward before anything is generated. Raises ValueError if it is not usable."""
    name = type(reward).__name__
    if not isinstance(getattr(reward, "needs_first_token_probs", None), bool):
        raise ValueError(
            f"the reward {name} does not set needs_first_token_probs; "
            "set it in the class, to False unless it reads first_token_probs"
        )
    signature = inspect.signature(reward.group_rewards)
    try:
        signature.bind((), None, None)
    except TypeError as error:
        raise ValueError(
            f"the reward {name} has group_rewards{signature}, "
            f"which cannot be called with three arguments ({error}); {WANTED}"
        ) from error


def checked_rewards(reward: Reward, returned: Any, *, num: int, task_id: str) -> tuple[float, ...]:
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
