"""Callbacks that add metrics to a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer


class StepMeter(Callback, ABC):
    """A callback that measures each step.

    The module calls it at the end of its ``training_step``. In ``on_train_batch_end`` every callback
    therefore finds all metrics of the step, whatever the order of the callbacks.
    """

    @abstractmethod
    def measure(self, trainer: Trainer, module: LightningModule) -> Mapping[str, float]:
        """Metrics of the step that has just been trained, reduced over ranks. A collective.

        It may read the metrics that the module and its rollouts have logged (``module.step_metrics``), but
        not those of another meter.
        """
