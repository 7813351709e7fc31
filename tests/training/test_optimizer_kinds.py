"""Which optimizers and schedulers a run can use, and resume with."""

from __future__ import annotations

import pytest
import torch
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
)

from rpt_lightning.training.modules.optimizer_kinds import check_kinds, check_same_kinds, kinds_of
from rpt_lightning.training.modules.optimizer_settings import apply_settings, settings_of


def made(kind, **settings) -> Optimizer:
    return kind([torch.nn.Parameter(torch.ones(2))], lr=0.1, **settings)


@pytest.mark.parametrize("kind", [AdamW, Adam, SGD, torch.optim.Adafactor, torch.optim.RMSprop])
def test_optimizers_that_step_by_themselves(kind):
    optimizer = made(kind)
    for scheduler in (
        None,
        LinearLR(optimizer),
        CosineAnnealingLR(optimizer, 10),
        ExponentialLR(optimizer, 0.9),
        LambdaLR(optimizer, lambda step: 1.0),
    ):
        check_kinds(optimizer, scheduler)
    check_kinds(made(SGD, momentum=0.9), OneCycleLR(made(SGD, momentum=0.9), max_lr=0.1, total_steps=10))


def test_one_that_computes_the_loss_itself():
    with pytest.raises(
        ValueError, match=r"--model.optimizer LBFGS: its step needs closure.*torch.optim.AdamW"
    ):
        check_kinds(made(LBFGS), None)


def test_a_schedule_by_a_metric():
    optimizer = made(AdamW)
    with pytest.raises(
        ValueError, match=r"--model.lr_scheduler ReduceLROnPlateau: its step needs metrics.*CosineAnnealingLR"
    ):
        check_kinds(optimizer, ReduceLROnPlateau(optimizer))


def test_a_run_goes_on_with_what_it_began_with():
    optimizer = made(AdamW)
    saved = kinds_of(optimizer, LinearLR(optimizer))
    assert saved == {"optimizer": "AdamW", "lr_scheduler": "LinearLR"}
    check_same_kinds(saved, saved)
    check_same_kinds({"optimizer": "AdamW", "lr_scheduler": None}, saved)
    with pytest.raises(
        ValueError,
        match=r"--model.optimizer SGD: the checkpoint's run has AdamW"
        r".*give --model.optimizer AdamW, or start a new run",
    ):
        check_same_kinds(kinds_of(made(SGD), None), saved)
    with pytest.raises(
        ValueError, match=r"--model.lr_scheduler CosineAnnealingLR: the checkpoint's run has LinearLR"
    ):
        check_same_kinds(kinds_of(optimizer, CosineAnnealingLR(optimizer, 3)), saved)


def test_a_checkpoint_of_an_earlier_version_does_not_name_them():
    """SGD after AdamW ended with KeyError: 'momentum'."""
    old, new = made(AdamW), made(SGD, momentum=0.9)
    given = settings_of(new)
    new.load_state_dict(old.state_dict())
    with pytest.raises(
        ValueError, match=r"--model.optimizer SGD: the checkpoint is of another optimizer, without .*momentum"
    ):
        apply_settings(new, given, is_scheduled=False)
