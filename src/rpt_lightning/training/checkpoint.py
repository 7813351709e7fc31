"""Checkpoints of a run: one file a saved step, complete or absent, the old ones pruned.

Lightning's ModelCheckpoint saves nothing at the end of a run whose steps do not divide evenly, ignores time under manual optimization and writes in place;
this one serializes through the same ``trainer.save_checkpoint``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

FOLDER = "checkpoints"
_PARTIAL = ".partial"
_ABANDONED = ".abandoned"


class RunCheckpoint(Checkpoint):
    """Saves ``checkpoints/step-N.ckpt`` in the run folder: model, optimizer, loops and task cursor.

    Args:
        every_n_steps: Optimizer steps between checkpoints; the last step of a run is always saved.
        keep: Number of newest checkpoints that are kept.
        keep_every_n_steps: Steps divisible by this are kept for good, e.g. for a scaling curve. None: only the newest.
    """

    def __init__(self, every_n_steps: int = 50, keep: int = 2, keep_every_n_steps: int | None = None) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(f"checkpoint.every_n_steps={every_n_steps}, checkpoint.keep={keep}: both must be at least 1")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.keep_every_n_steps = keep_every_n_steps
        self.start_step: int | None = None  # where training began in this process, on every rank; None: not yet
        self._saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start_step = self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            _abandon_after(trainer.global_step, _folder(trainer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step - self._saved_step >= self.every_n_steps:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > self._saved_step:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            rank_zero_info(f"stopped at step {trainer.global_step}. {_way_on(_folder(trainer))}")

    def _save(self, trainer: Trainer) -> None:
        folder = _folder(trainer)
        path = folder / f"step-{trainer.global_step:06d}.ckpt"
        partial = path.with_name(path.name + _PARTIAL)
        try:
            trainer.save_checkpoint(partial, weights_only=False)  # the optimizer too
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            if trainer.is_global_zero:
                _remove(partial)
            raise RuntimeError(
                f"cannot write the checkpoint of step {trainer.global_step} into {folder}: {error}. Is the disk full? Make room there "
                f"(a checkpoint holds weights and optimizer) or keep fewer (checkpoint.keep={self.keep}). {_way_on(folder)}"
            ) from error
        if trainer.is_global_zero:
            _remove(path)
            partial.rename(path)
            self._prune(folder)
        trainer.strategy.barrier("checkpoint")
        self._saved_step = trainer.global_step
        rank_zero_info(f"checkpoint: {path}")

    def _prune(self, folder: Path) -> None:
        steps = checkpoint_steps(folder)
        for step in steps[: -self.keep]:
            if self.keep_every_n_steps is None or step % self.keep_every_n_steps:
                _remove(folder / f"step-{step:06d}.ckpt")
        for leftover in folder.glob(f"*{_PARTIAL}"):
            _remove(leftover)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.ckpt"))


def last_checkpoint(run_folder: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        ValueError: There is none.
    """
    folder = run_folder / FOLDER
    steps = checkpoint_steps(folder)
    if not steps:
        raise ValueError(f"ckpt_path=last: there is no checkpoint in {folder}; leave --ckpt_path out to start this run")
    return folder / f"step-{steps[-1]:06d}.ckpt"


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER


def _way_on(folder: Path) -> str:
    steps = checkpoint_steps(folder)
    if not steps:
        return "There is no complete checkpoint yet: the same command starts anew."
    return f"The last complete checkpoint is {folder / f'step-{steps[-1]:06d}.ckpt'}: continue with --ckpt_path last."


def _abandon_after(step: int, folder: Path) -> None:
    """A run that goes on from an earlier checkpoint makes its later ones anew: the old ones must be neither the run's last nor pruned against the new."""
    for later in checkpoint_steps(folder):
        if later > step:
            path = folder / f"step-{later:06d}.ckpt"
            number, target = 2, path.with_name(path.name + _ABANDONED)
            while target.exists():
                number, target = number + 1, path.with_name(f"{path.name}.{number}{_ABANDONED}")
            path.rename(target)
            rank_zero_info(f"checkpoint: {path} is beyond step {step}, from which the run goes on; it is now {target.name}")


def _remove(path: Path) -> None:
    """A checkpoint is a file, or a folder where the strategy writes it sharded."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
