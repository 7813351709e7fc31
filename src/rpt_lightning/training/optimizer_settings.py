"""The settings of an optimizer (lr, betas, weight decay, ...) in a run that goes on: those that are given hold, not those of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

Settings = dict[str, Any]


def settings_of(optimizer: Optimizer) -> list[Settings]:
    """Of each of its groups of parameters."""
    return [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]


def apply_settings(optimizer: Optimizer, given: Sequence[Settings], *, is_scheduled: bool) -> None:
    """Puts the given settings in the place of those that a checkpoint has brought, and says what changes.

    With a scheduler ``given`` are the settings after it was made, since some schedulers (OneCycleLR) set the lr that they begin with. Raises ValueError for
    another lr where a scheduler drives it: the scheduler's state is that of the old one.
    """
    for group, wanted in zip(optimizer.param_groups, given, strict=True):
        if lacking := sorted(wanted.keys() - group.keys() - {"initial_lr"}):
            raise ValueError(
                f"--model.optimizer {type(optimizer).__name__}: the checkpoint is of another optimizer, without {', '.join(lacking)}; give the one that "
                "the run began with, or start a new run from what `rpt export` makes of the checkpoint"
            )
        wanted_lr = wanted.get("initial_lr", wanted["lr"])
        if is_scheduled and group.get("initial_lr", wanted_lr) != wanted_lr:
            raise ValueError(
                f"model.optimizer: the checkpoint's lr scheduler goes from lr {group['initial_lr']:g}, and lr {wanted_lr:g} is given. Give the former, or "
                "start a new run from what `rpt export` makes of the checkpoint"
            )
        # What a schedule moves is where the schedule has come to. OneCycleLR and CyclicLR may move the momentum, and mark groups where they do.
        driven = (
            {"lr", *(("momentum", "betas") if "base_momentum" in group else ())} if is_scheduled else set()
        )
        changed = {
            name: value
            for name, value in wanted.items()
            if name in group and not _equal(group[name], value) and name not in driven
        }
        if changed:
            rank_zero_info(
                "optimizer, from here on as given: "
                + ", ".join(f"{name} {value} (was {group[name]})" for name, value in changed.items())
            )
            group.update(changed)


def _equal(one: Any, other: Any) -> bool:
    """Checkpoints in shards may make a list of a tuple."""
    return (
        list(one) == list(other)
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple))
        else bool(one == other)
    )
