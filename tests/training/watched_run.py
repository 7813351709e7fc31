"""A small run, every batch that it trained on, and the error that ended it."""

from __future__ import annotations

from lightning.pytorch import Callback
from small_run import flat_weights

from rpt_lightning.training.engine_check.sync_check import SyncError


class Watch(Callback):
    """Keeps every batch's rollouts and the weights after every step."""

    def __init__(self):
        self.batches, self.weights = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch.rollouts)
        self.weights.append(flat_weights(pl_module))


def run(make_run, steps, engine, more=(), **options):
    watch = Watch()
    trainer, module, data = make_run(steps, engine=lambda: engine, callbacks=[watch, *more], **options)
    error = None
    try:
        trainer.fit(module, data)
    except (SyncError, ValueError) as raised:
        error = raised
    return watch, module, data, error
