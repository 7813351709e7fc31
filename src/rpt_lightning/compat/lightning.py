"""Lightning: its loops, strategies and command line. Tested with lightning 2.6.6.

lightning_checkpoint.py is about the files that Lightning writes.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

# Lightning's `rank_zero_info` and `rank_zero_warn` write to the logger of this name.
MESSAGE_LOGGER = "lightning.pytorch.utilities.rank_zero"

C = TypeVar("C", bound=Callback)

# The trainer's loops


def callbacks_of(trainer: Trainer, kind: type[C]) -> list[C]:
    """Return the trainer's callbacks of a class, in the trainer's order.

    Relies on ``trainer.callbacks``, which the trainer sets but does not declare.
    """
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def is_validation_due(trainer: Trainer) -> bool:
    """Whether the fit loop would validate after the last batch that it finished.

    Relies on ``_should_check_val_fx`` of the epoch loop and on the fit loop's ``_data_fetcher``, which exists
    once the fit has begun.
    """
    fetcher: Any = trainer.fit_loop._data_fetcher
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def run_validation(trainer: Trainer) -> None:
    """Validate now, in the middle of a fit.

    Relies on the epoch loop's ``val_loop``. The trainer must be ``validating`` while that runs, and
    ``training`` afterwards.
    """
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def batch_index(trainer: Trainer) -> int:
    """Return the index of the current training batch, counted over all passes.

    Relies on the epoch loop's ``total_batch_idx``. The ``batch_idx`` that callbacks get restarts with each
    pass.
    """
    return trainer.fit_loop.epoch_loop.total_batch_idx


# The processes of a run


def cluster_environment(trainer: Trainer) -> Any:
    """Return Lightning's object for what started this process: its own launcher, SLURM, torchrun and so on.

    Relies on the trainer's ``_accelerator_connector``.
    """
    return trainer._accelerator_connector.cluster_environment


def collective_timeout(strategy: Strategy) -> timedelta | None:
    """Return the time limit of collectives, or None if the strategy has none.

    Relies on ``_timeout`` of the distributed strategies.
    """
    timeout: timedelta | None = getattr(strategy, "_timeout", None)
    return timeout


def data_rank(strategy: Any) -> tuple[int, int]:
    """Return this process's data-parallel rank and the number of such ranks. (0, 1) for a single process.

    Relies on ``distributed_sampler_kwargs`` of the distributed strategies. With tensor parallelism it counts
    each group of devices once.
    """
    kwargs = getattr(strategy, "distributed_sampler_kwargs", None)
    return (int(kwargs["rank"]), int(kwargs["num_replicas"])) if kwargs else (0, 1)


def tensor_parallel_size(strategy: ModelParallelStrategy) -> int:
    """Return the number of devices that compute one model together.

    Relies on ``_tensor_parallel_size``, which is a number if a number was given.
    """
    return int(strategy._tensor_parallel_size)


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set the number of data-parallel ranks before ``setup_environment``, which makes the mesh.

    Relies on ``_data_parallel_size``. It is known only once the trainer has counted the devices, and
    Lightning's own "auto" is the number of nodes.
    """
    strategy._data_parallel_size = size


# Modules


def has_trainer(module: LightningModule) -> bool:
    """Whether a trainer has the module. ``module.trainer`` raises an error if none has.

    Relies on ``_trainer``.
    """
    return module._trainer is not None


def set_device(module: LightningModule, device: torch.device) -> None:
    """Set what ``module.device`` returns, without moving any weights.

    Relies on ``_device``, which ``module.to`` would set.
    """
    module._device = device


# The command line and the screen


class OpenCLI(LightningCLI):
    """Lightning's command line with public names for three of its steps, which a subclass may override.

    Relies on ``_parse_ckpt_path``, ``_set_seed`` and ``_instantiate_trainer``, and on Lightning calling them.
    """

    def read_checkpoint_settings(self) -> None:
        """Take hyper-parameters from the checkpoint that the configuration names."""
        super()._parse_ckpt_path()

    def seed_run(self) -> None:
        """Seed the random generators."""
        super()._set_seed()

    def make_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        """Build the trainer from its configuration and further callbacks."""
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        self.read_checkpoint_settings()

    def _set_seed(self) -> None:
        self.seed_run()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        return self.make_trainer(config, callbacks)


class DescribedProgressBar(RichProgressBar):
    """Lightning's Rich progress bar with a text of our own before the bar of training.

    Relies on ``_get_train_description``, and on Lightning calling it.
    """

    def describe_pass(self, current_epoch: int) -> str:
        """Return the text."""
        return super()._get_train_description(current_epoch)

    def _get_train_description(self, current_epoch: int) -> str:
        return self.describe_pass(current_epoch)
