"""Which optimizers and schedulers a run can have, and that a run goes on with those that it began with: their states mean nothing to others."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

Kinds = Mapping[str, "str | None"]


def kinds_of(optimizer: Optimizer, scheduler: Any) -> dict[str, str | None]:
    """Their classes, under the names of their flags."""
    return {
        "optimizer": type(optimizer).__name__,
        "lr_scheduler": None if scheduler is None else type(scheduler).__name__,
    }


def check_kinds(optimizer: Optimizer, scheduler: Any) -> None:
    """Raises ValueError for what a step of this package cannot drive: one pass over a batch's gradients, then ``step()`` of both."""
    if needed := _needed(type(optimizer)):
        raise ValueError(
            f"--model.optimizer {type(optimizer).__name__}: its step needs {', '.join(needed)}, to compute the loss several times a step; a step of "
            "rollouts is computed once. Give one whose step needs nothing, such as torch.optim.AdamW or torch.optim.SGD"
        )
    if scheduler is not None and (needed := _needed(type(scheduler))):
        raise ValueError(
            f"--model.lr_scheduler {type(scheduler).__name__}: its step needs {', '.join(needed)}, and schedules go by optimizer steps alone here; give one "
            "whose step needs nothing, such as torch.optim.lr_scheduler.CosineAnnealingLR or LinearLR"
        )


def check_same_kinds(given: Kinds, saved: Kinds) -> None:
    """Raises ValueError where a run goes on with another class than the checkpoint's."""
    for flag, kind in saved.items():
        if kind is not None and given[flag] not in (None, kind):
            raise ValueError(
                f"--model.{flag} {given[flag]}: the checkpoint's run has {kind}, whose state it cannot go on with; give "
                f"--model.{flag} {kind}, or start a new run from what `rpt export` makes of the checkpoint"
            )


def _needed(kind: Any) -> list[str]:
    """Names of the arguments that a ``step`` must be given. Of the class, since a scheduler puts a wrapper in the place of its optimizer's."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    _, *parameters = inspect.signature(kind.step).parameters.values()
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in variable
    ]
