"""Checks which optimizers and schedulers a run can use, and that a resumed run keeps its own.

The state of one class means nothing to another.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

Kinds = Mapping[str, "str | None"]


def kinds_of(optimizer: Optimizer, scheduler: Any) -> dict[str, str | None]:
    """The classes of both, under the names of their flags."""
    return {
        "optimizer": type(optimizer).__name__,
        "lr_scheduler": None if scheduler is None else type(scheduler).__name__,
    }


def check_kinds(optimizer: Optimizer, scheduler: Any) -> None:
    """Raise ValueError if a step of this package cannot drive the optimizer or the scheduler.

    A step makes one pass over a batch's gradients, then calls ``step()`` of both.
    """
    if needed := _needed(type(optimizer)):
        raise ValueError(
            f"--model.optimizer {type(optimizer).__name__}: its step needs {', '.join(needed)}, because it "
            "computes the loss several times a step, but a step of rollouts is computed only once. Give one "
            "whose step needs no arguments, such as torch.optim.AdamW or torch.optim.SGD"
        )
    if scheduler is not None and (needed := _needed(type(scheduler))):
        raise ValueError(
            f"--model.lr_scheduler {type(scheduler).__name__}: its step needs {', '.join(needed)}, but "
            "schedules here depend only on the number of optimizer steps; give one whose step needs no "
            "arguments, such as torch.optim.lr_scheduler.CosineAnnealingLR or LinearLR"
        )


def check_same_kinds(given: Kinds, saved: Kinds) -> None:
    """Raise ValueError if a run resumes with a class other than the checkpoint's."""
    for flag, kind in saved.items():
        if kind is not None and given[flag] not in (None, kind):
            raise ValueError(
                f"--model.{flag} {given[flag]}: the checkpoint's run has {kind}, whose state it cannot "
                f"use; give --model.{flag} {kind}, or start a new run from a model that `rpt export` makes "
                "of the checkpoint"
            )


def _needed(kind: Any) -> list[str]:
    """Names of the required arguments of ``step``.

    They are read from the class, since a scheduler wraps the ``step`` of its optimizer.
    """
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    _, *parameters = inspect.signature(kind.step).parameters.values()
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in variable
    ]
