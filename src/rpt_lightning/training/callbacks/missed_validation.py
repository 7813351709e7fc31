"""Runs the validation that a killed run did not reach."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from rpt_lightning.compat.lightning import is_validation_due, run_validation
from rpt_lightning.records.run_folder import ANSWER_FOLDER, VALIDATION_FOLDER


class MissedValidation(Checkpoint):
    """Makes up for a missed validation when a run resumes.

    A run may be killed after a checkpoint but before the validation that is due at the same step. When it
    resumes, Lightning assumes that the validation took place.

    It is a ``Checkpoint``, which Lightning calls last, so that it runs after `StopRun`. A signal during this
    validation must not meet Lightning's own handlers.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_missed(trainer):
            run_validation(trainer)


def is_missed(trainer: Trainer) -> bool:
    """Whether a validation was due at the loaded step but left no record.

    A collective. Call it once the fit has begun.
    """
    folders = (Path(trainer.default_root_dir) / name for name in (VALIDATION_FOLDER, ANSWER_FOLDER))
    is_done = any((folder / f"step-{trainer.global_step:06d}.jsonl").exists() for folder in folders)
    is_due = trainer.global_step > 0 and trainer.enable_validation and is_validation_due(trainer)
    return is_due and not trainer.strategy.broadcast(is_done)
