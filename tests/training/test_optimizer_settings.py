"""The optimizer's settings in a resumed run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR, OneCycleLR

from rpt_lightning.training.modules.optimizer_settings import apply_settings, settings_of


def adamw(**settings) -> AdamW:
    return AdamW([torch.nn.Parameter(torch.ones(2))], **settings)


def going_on(old: AdamW, new: AdamW, *, is_scheduled: bool = False) -> AdamW:
    """Resume as Lightning does: the new optimizer takes over the old one's state, including its settings."""
    given = settings_of(new)
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    apply_settings(new, given, is_scheduled=is_scheduled)
    return new


def test_what_is_given_holds_and_is_said(caplog):
    old = adamw(lr=1e-6, weight_decay=0.01)
    with caplog.at_level("INFO"):
        new = going_on(old, adamw(lr=1e-7, weight_decay=0.1, betas=(0.9, 0.95)))
    group = new.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-7, 0.1, (0.9, 0.95))
    assert "lr 1e-07 (was 1e-06)" in caplog.text
    assert "weight_decay 0.1 (was 0.01)" in caplog.text


def test_nothing_is_said_where_nothing_changes(caplog):
    old = adamw(lr=1e-6)
    old.param_groups[0]["betas"] = list(old.param_groups[0]["betas"])  # shards
    with caplog.at_level("INFO"):
        going_on(old, adamw(lr=1e-6))
    assert caplog.text == ""


def test_a_schedule_goes_on_where_it_is_and_not_with_another_lr():
    old = adamw(lr=1e-3, weight_decay=0.01)
    schedule = LinearLR(old, start_factor=0.5, total_iters=10)
    for _ in range(3):
        old.step()
        schedule.step()
    reached = old.param_groups[0]["lr"]
    assert reached not in (1e-3, 0.5e-3)
    new = going_on(old, adamw(lr=1e-3, weight_decay=0.1), is_scheduled=True)
    assert (new.param_groups[0]["lr"], new.param_groups[0]["weight_decay"]) == (reached, 0.1)
    with pytest.raises(ValueError, match=r"lr scheduler starts from lr 0\.001, but lr 0\.0001 is given"):
        going_on(old, adamw(lr=1e-4), is_scheduled=True)


def test_a_schedule_that_sets_its_own_first_lr_starts_and_goes_on():
    """OneCycleLR begins at max_lr / 25, whatever lr the optimizer was given, and moves the first beta."""

    def scheduled() -> tuple[AdamW, OneCycleLR]:
        optimizer = adamw(lr=2e-3)
        return optimizer, OneCycleLR(optimizer, max_lr=2e-3, total_steps=10)

    old, schedule = scheduled()
    apply_settings(old, settings_of(old), is_scheduled=True)  # a start
    assert old.param_groups[0]["lr"] == pytest.approx(2e-3 / 25)
    for _ in range(3):
        old.step()
        schedule.step()
    reached = {name: old.param_groups[0][name] for name in ("lr", "betas")}
    assert reached["lr"] != pytest.approx(2e-3 / 25)
    assert reached["betas"] != scheduled()[0].param_groups[0]["betas"]
    new = going_on(old, scheduled()[0], is_scheduled=True)
    assert {name: new.param_groups[0][name] for name in reached} == reached
