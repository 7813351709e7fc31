"""Settings of the optimizer (lr, betas, weight decay, ...) in a resumed run.

The given settings override the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from rpt_lightning.compat.torch import scheduled_settings

Settings = dict[str, Any]


def settings_of(optimizer: Optimizer) -> list[Settings]:
    """The settings of each parameter group."""
    return [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]


def apply_settings(optimizer: Optimizer, given: Sequence[Settings], *, is_scheduled: bool) -> None:
    """Replace the settings that came from a checkpoint by the given ones, and report the changes.

    Args:
        optimizer: The optimizer with the checkpoint's settings.
        given: Settings of each parameter group. With a scheduler they are read after it was made, since some
            schedulers (OneCycleLR) set their initial lr.
        is_scheduled: Whether a scheduler drives the lr.

    Raises:
        ValueError: The checkpoint is of another optimizer, or the lr changes while a scheduler drives it. The
            scheduler's state belongs to the old lr.
    """
    for group, wanted in zip(optimizer.param_groups, given, strict=True):
        if lacking := sorted(wanted.keys() - group.keys() - {"initial_lr"}):
            raise ValueError(
                f"--model.optimizer {type(optimizer).__name__}: the checkpoint is of another optimizer, "
                f"without {', '.join(lacking)}; give the one that the run began with, or start a new run "
                "from a model that `rpt export` makes of the checkpoint"
            )
        wanted_lr = wanted.get("initial_lr", wanted["lr"])
        if is_scheduled and group.get("initial_lr", wanted_lr) != wanted_lr:
            raise ValueError(
                f"model.optimizer: the checkpoint's lr scheduler starts from lr {group['initial_lr']:g}, but "
                f"lr {wanted_lr:g} is given. Give the former, or start a new run from a model that `rpt "
                "export` makes of the checkpoint"
            )
        # Settings that a schedule moves keep the schedule's current values.
        driven = scheduled_settings(group) if is_scheduled else set()
        changed = {
            name: value
            for name, value in wanted.items()
            if name in group and not _equal(group[name], value) and name not in driven
        }
        if changed:
            rank_zero_info(
                "optimizer, as given from here on: "
                + ", ".join(f"{name} {value} (was {group[name]})" for name, value in changed.items())
            )
            group.update(changed)


def _equal(one: Any, other: Any) -> bool:
    """Compare two settings. A sharded checkpoint may turn a tuple into a list."""
    return (
        list(one) == list(other)
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple))
        else bool(one == other)
    )
