"""A small run with rollouts in the background, and the batches that it trained on."""

from __future__ import annotations

import json

from lightning.pytorch import Callback
from real_runs import SomeAreRight
from small_run import flat_weights

from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.training.callbacks.rollout_callback import RolloutCallback

TASKS = 8  # a step


OBJECTIVE = NextTokenObjective(ContinuationPrompt(), SomeAreRight())


class Watch(Callback):
    """Keeps the batches that every step trained on, and the weights before and after it."""

    def __init__(self):
        self.batches, self.weights = [], []

    def on_train_start(self, trainer, pl_module):
        self.weights.append(flat_weights(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch.rollouts.groups)
        self.weights.append(flat_weights(pl_module))


def make(
    make_run, steps, engine, *, staleness=1, more=(), rollout_options=None, module_options=None, **options
):
    watch = Watch()
    trainer, module, data = make_run(
        steps,
        engine=lambda: engine,
        callbacks=[watch, *more],
        rollout_options={"max_staleness": staleness} | (rollout_options or {}),
        module_options={"correction": "truncate"} | (module_options or {}),
        **options,
    )
    rollout_of(trainer).objective = OBJECTIVE
    return trainer, module, data, watch


def rollout_of(trainer):
    return next(callback for callback in trainer.callbacks if isinstance(callback, RolloutCallback))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def task_ids(batches):
    return [group.task.task_id for groups in batches for group in groups]


def versions(batches):
    return [
        {completion.policy_version for group in groups for completion in group.completions}
        for groups in batches
    ]


def tasks_in_order(make_run, num_steps):
    """The tasks of a run's first steps, read straight from the data."""
    _, _, data = make_run(1)
    data.setup("fit")
    return [data.next_batch().tasks for _ in range(num_steps)]
