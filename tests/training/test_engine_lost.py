"""A run whose engine is lost in the middle of a step.

It leaves a whole checkpoint of the step before and resumes from there.
"""

from __future__ import annotations

import functools
from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from real_runs import SomeAreRight, differences, traces
from small_run import SCRIPT

from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.rollout.engines.base import EngineLost
from rpt_lightning.rollout.engines.scripted_engine import ScriptedEngine
from rpt_lightning.rollout.settings import DynamicSampling
from rpt_lightning.training.callbacks.logs import RolloutSamples, StepLog, ValidationResults
from rpt_lightning.training.callbacks.missed_validation import MissedValidation
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback
from rpt_lightning.training.checkpoint.callback import RunCheckpoint, last_checkpoint

STEPS = 5
VALIDATES = {
    "limit_val_batches": 1,
    "val_check_interval": 2,
    "data_options": {"num_eval_tasks": 4, "eval_batch_size": 4},
}


class IsLost(ScriptedEngine):
    """Is lost from a version on: in a step's first generation or in a later round, on all ranks or on one."""

    def __init__(self, version, *, in_later_round=False, rank=None):
        super().__init__(SCRIPT)
        self.lost_from, self.in_later_round, self.rank = version, in_later_round, rank
        self.last_version = None

    def _generate(self, requests):
        is_later_round, self.last_version = self.version == self.last_version, self.version
        is_there = self.rank is None or self.rank == torch.distributed.get_rank()
        if self.version >= self.lost_from and is_there and is_later_round == self.in_later_round:
            raise EngineLost("none of the 2 servers could be used")
        return super()._generate(requests)


class IsLostInUpdate(ScriptedEngine):
    """Is lost while it gets the weights of a version."""

    def __init__(self, version):
        super().__init__(SCRIPT)
        self.lost_at, self.last_version = version, None

    def _update_weights(self, weights, version):
        self.last_version = version
        if version == self.lost_at:
            raise EngineLost("none of the 2 servers could be used")
        super()._update_weights(weights, version)


def make(make_run, folder, engine, *, every_n_steps=100, **options):
    callbacks = [StepLog(), RolloutSamples(every_n_steps=1), ValidationResults(), MissedValidation()]
    trainer, module, data = make_run(
        STEPS, engine=lambda: engine, run_dir=folder, callbacks=callbacks, **options
    )
    for callback in trainer.callbacks:
        if isinstance(callback, RunCheckpoint):
            callback.every_n_steps = every_n_steps
        if isinstance(callback, RolloutCallback):
            callback.objective = NextTokenObjective(ContinuationPrompt(), SomeAreRight())
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    return trainer, module, data


def check_goes_on(make_run, folder, engine, **options):
    trainer, module, data = make(make_run, folder / "whole", ScriptedEngine(SCRIPT), **options)
    trainer.fit(module, data)
    whole = traces(folder / "whole")
    num_logged = trainer.fit_loop.epoch_loop._batches_that_stepped
    trainer, module, data = make(make_run, folder / "parts", engine, **options)
    with pytest.raises(EngineLost, match="none of the 2 servers"):
        trainer.fit(module, data)
    path = last_checkpoint(folder / "parts")
    assert path.name == f"step-{engine.last_version:06d}.ckpt"
    assert engine.last_version < STEPS
    assert len(list(path.parent.iterdir())) == 1  # nothing else saved one
    trainer, module, data = make(make_run, folder / "parts", ScriptedEngine(SCRIPT), **options)
    trainer.fit(module, data, ckpt_path=str(path), weights_only=True)
    assert differences(traces(folder / "parts"), whole) == []
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == num_logged == STEPS  # the loggers' steps
    return whole["steps"][engine.last_version]


def test_the_run_goes_on_bit_for_bit(make_run, tmp_path):
    check_goes_on(make_run, tmp_path, IsLost(3))


def test_in_an_update_of_the_weights(make_run, tmp_path):
    check_goes_on(make_run, tmp_path, IsLostInUpdate(3))


def test_in_a_later_round_of_dynamic_sampling(make_run, tmp_path):
    """Tasks that were drawn beyond the step's own are drawn again as well."""
    options = {"rollout_options": {"dynamic_sampling": DynamicSampling(from_step=0)}}
    lost_step = check_goes_on(make_run, tmp_path, IsLost(1, in_later_round=True), **options)
    assert lost_step["rollout/replaced_groups"] > 0


def test_in_the_first_step_of_an_epoch(make_run, tmp_path):
    check_goes_on(make_run, tmp_path, IsLost(2), limit_train_batches=2)


@pytest.mark.parametrize("in_later_round", [False, True], ids=["in the validation", "in the step behind it"])
@pytest.mark.parametrize("steps_per_epoch", [None, pytest.param(3, marks=pytest.mark.long)])
def test_where_a_validation_was_due(make_run, tmp_path, in_later_round, steps_per_epoch):
    """Lightning's loops are then in another state than after an ordinary step.

    With 3 steps an epoch, the step after the validation is the epoch's last.
    """
    engine = IsLost(2, in_later_round=in_later_round)
    check_goes_on(make_run, tmp_path, engine, **VALIDATES, limit_train_batches=steps_per_epoch)
    assert engine.last_version == 2


def test_while_rollouts_are_generated_ahead(make_run, tmp_path):
    """Which rollouts a run trains on then depends on what was ready. No task is lost or doubled."""
    options = {"rollout_options": {"max_staleness": 1}, "module_options": {"correction": "truncate"}}
    trainer, module, data = make(make_run, tmp_path, IsLost(2), **options)
    with pytest.raises(EngineLost):
        trainer.fit(module, data)
    path = last_checkpoint(tmp_path)
    trained = int(path.stem.removeprefix("step-"))
    assert trained == 2  # the engine is tried with the weights of version 2 before they are trained further
    assert torch.load(path, weights_only=True)["TokenTaskDataModule"]["stream"]["index"] == 8 * trained
    trainer, module, data = make(make_run, tmp_path, ScriptedEngine(SCRIPT), **options)
    trainer.fit(module, data, ckpt_path=str(path), weights_only=True)
    assert [row["step"] for row in traces(tmp_path)["steps"]] == list(range(1, STEPS + 1))
    assert (
        torch.load(last_checkpoint(tmp_path), weights_only=True)["TokenTaskDataModule"]["stream"]["index"]
        == 8 * STEPS
    )


def test_before_the_first_step_there_is_nothing_to_save(make_run, tmp_path):
    trainer, module, data = make(make_run, tmp_path, IsLost(0))
    with pytest.raises(EngineLost):
        trainer.fit(module, data)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.long
@pytest.mark.parametrize("staleness", [0, 1])
def test_one_of_two_ranks_loses_it(make_run, tmp_path, staleness):
    """Saving is a collective: a rank that did not know would wait in another one."""
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo", timeout=timedelta(seconds=60))
    trainer, module, data = make(
        make_run,
        tmp_path,
        IsLost(2, rank=1),
        rollout_options={"max_staleness": staleness},
        module_options={"correction": "truncate"},
        devices=2,
        strategy=strategy,
    )
    module.make_optimizer = functools.partial(torch.optim.SGD, lr=0.1)  # travels to the other process
    with pytest.raises(
        Exception, match=r"none of the 2 servers could be used|another rank has lost the engine"
    ):
        trainer.fit(module, data)
    path = last_checkpoint(tmp_path)
    assert path.name == "step-000002.ckpt"
    assert torch.load(path, weights_only=True)["TokenTaskDataModule"]["stream"]["index"] == 16
