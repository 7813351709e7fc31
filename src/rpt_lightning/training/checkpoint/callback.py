"""Checkpoints of a run: one file for each saved step, complete or absent, with the old ones pruned.

Lightning's ModelCheckpoint saves nothing at the end of a run whose steps do not divide evenly. It ignores
time under manual optimization, and it writes in place. This one serializes through the same
``trainer.save_checkpoint``, but gives a file its name only when the file is complete and on disk. So whenever
and however the process ends, the newest name is a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.checkpoint.api import CheckpointException

from rpt_lightning.compat.lightning_checkpoint import place_of, set_place
from rpt_lightning.records.run_folder import ANSWER_FOLDER, ROLLOUT_FOLDER, VALIDATION_FOLDER
from rpt_lightning.rollout.engines.base import EngineLost
from rpt_lightning.training.checkpoint.damage import checkpoint_damage
from rpt_lightning.training.checkpoint.writer import StreamedCheckpointIO, files_of, flush_to_disk
from rpt_lightning.training.engine_check.sync_check import SyncError

FOLDER = "checkpoints"
_PARTIAL = ".partial"
_ABANDONED = ".abandoned"


class CheckpointNotWritten(RuntimeError):
    """Writing a checkpoint failed. The message says why, and how to resume the run."""


class RunCheckpoint(Checkpoint):
    """Saves ``checkpoints/step-N.ckpt`` in the run folder: model, optimizer, loops and place in the data.

    Args:
        every_n_steps: Number of optimizer steps between checkpoints. The last step of a run is always saved.
        keep: Number of most recent checkpoints to keep.
        keep_every_n_steps: Checkpoints of steps divisible by this number are never deleted, for example for a
            scaling curve. With None, only the most recent checkpoints are kept.
    """

    def __init__(self, every_n_steps: int = 50, keep: int = 2, keep_every_n_steps: int | None = None) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(
                f"checkpoint.every_n_steps={every_n_steps}, checkpoint.keep={keep}: both must be at least 1"
            )
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.keep_every_n_steps = keep_every_n_steps
        self.resumes_from: str | None = None  # the checkpoint that this rank found; None: a new run
        # Step at which training began in this process, the same on every rank. None: it has not begun.
        self.start_step: int | None = None
        self._saved_step = 0
        # State of Lightning's loops and of the data at the end of the last step.
        self._step_end: dict[str, Any] = {}
        self._is_as_at_step_end = False  # whether the policy has not changed since then

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # A strategy that writes shards ignores this.
        trainer.strategy.checkpoint_io = StreamedCheckpointIO()
        if stage == TrainerFn.FITTING:
            self._check_same_start(trainer)

    def _check_same_start(self, trainer: Trainer) -> None:
        """Raise ValueError on every rank if the ranks found different last checkpoints.

        Each rank looked for the last checkpoint on its own, before the ranks met.
        """
        if trainer.world_size == 1:
            return
        found: list[str | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, self.resumes_from and Path(self.resumes_from).name)
        if len(set(found)) > 1:
            ranks = "; ".join(
                f"{name or 'none'}: rank "
                f"{', '.join(str(rank) for rank, other in enumerate(found) if other == name)}"
                for name in dict.fromkeys(found)
            )
            raise ValueError(
                f"the ranks would start from different checkpoints of {_folder(trainer)} ({ranks}). The run "
                "folder must be the same one on every node, and readable: look at it from each node. A "
                "network file system may show a new checkpoint half a minute late; in that case start the "
                "run again"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start_step = self._saved_step = trainer.global_step
        self._step_end = {}
        if trainer.is_global_zero:
            _abandon_after(trainer.global_step, Path(trainer.default_root_dir))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step_end = place_of(trainer)
        self._is_as_at_step_end = True
        if trainer.global_step - self._saved_step >= self.every_n_steps:
            self.save(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._is_as_at_step_end = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Saving is a collective. With several ranks only errors that end all of them at the same place are
        # followed by a save (`saved_when_lost`).
        if (
            trainer.world_size == 1
            and trainer.state.fn == TrainerFn.FITTING
            and not isinstance(exception, (SystemExit, CheckpointNotWritten))
        ):
            self.save_last_step(trainer)
        # A run that was asked to stop (SystemExit) reports that itself. A run that had not begun reports
        # nothing.
        if self.start_step is not None and not isinstance(exception, (SystemExit, CheckpointNotWritten)):
            rank_zero_info(f"stopped at step {trainer.global_step}. {_way_on(_folder(trainer))}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The next step or a validation may have begun. The weights include neither.
        if self._step_end:
            set_place(checkpoint, self._step_end)

    def save(self, trainer: Trainer) -> None:
        """Save the policy as of the end of its last step. Does nothing if that step is already saved.

        Called on every rank, while no step changes the policy.
        """
        if trainer.global_step <= self._saved_step:
            return
        folder = _folder(trainer)
        path = folder / f"step-{trainer.global_step:06d}.ckpt"
        partial = path.with_name(path.name + _PARTIAL)
        try:
            if trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)  # it may have been deleted meanwhile
                _remove(partial)  # left by a killed run
            trainer.save_checkpoint(partial, weights_only=False)  # False: the optimizer too
            if trainer.is_global_zero:
                flush_to_disk(files_of(partial))
        # RuntimeError is left out: a collective that fails because a rank died raises it.
        except (OSError, CheckpointException) as error:
            if trainer.is_global_zero:
                _remove(partial)
            raise CheckpointNotWritten(
                f"cannot write the checkpoint of step {trainer.global_step} into {folder}: {error}. Is the "
                "disk full? Make room there (a checkpoint holds weights and optimizer) or keep fewer "
                f"(checkpoint.keep={self.keep}). {_way_on(folder)}"
            ) from error
        if trainer.is_global_zero:
            _remove(path)
            partial.rename(path)
            flush_to_disk([folder])  # the new name must be on disk before an older checkpoint is removed
            self._prune(folder)
        trainer.strategy.barrier("checkpoint")
        self._saved_step = trainer.global_step
        rank_zero_info(f"checkpoint: {path}")

    def save_last_step(self, trainer: Trainer) -> None:
        """Like ``save``, for a run that ends in the middle of a step. It never raises.

        Does nothing once that step has begun to change the policy.
        """
        if self.start_step is None or not self._is_as_at_step_end:
            return
        try:
            self.save(trainer)
        except Exception as failed:  # the reason why the run ends matters more
            rank_zero_info(str(failed))

    def _prune(self, folder: Path) -> None:
        steps = checkpoint_steps(folder)
        for step in steps[: -self.keep]:
            if self.keep_every_n_steps is None or step % self.keep_every_n_steps:
                _remove(folder / f"step-{step:06d}.ckpt")
        for leftover in folder.glob(f"*{_PARTIAL}"):
            _remove(leftover)


@contextlib.contextmanager
def saved_when_lost(trainer: Trainer) -> Iterator[None]:
    """Save the last step if the engine is lost or does not hold the policy's weights, then re-raise.

    Wrap it around code that needs the engine during training, where every rank fails together. Lightning's
    ``on_exception`` cannot do this: Lightning does not call it in processes that it spawned.
    """
    try:
        yield
    except (EngineLost, SyncError):
        save_last_step(trainer)
        raise


def save_last_step(trainer: Trainer) -> None:
    """Save the last completed step of a training run that is about to end with an error.

    A collective. It never raises.
    """
    for callback in trainer.checkpoint_callbacks if trainer.state.fn == TrainerFn.FITTING else ():
        if isinstance(callback, RunCheckpoint):
            callback.save_last_step(trainer)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, in ascending order."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.ckpt"))


def last_checkpoint(run_folder: Path) -> Path:
    """The newest whole checkpoint of a run.

    A damaged one is skipped with a warning: the resumed run repeats the steps since the one before exactly.
    It keeps the damaged file under another name.

    Raises:
        ValueError: There is no checkpoint, or all are damaged.
    """
    folder = run_folder / FOLDER
    steps = checkpoint_steps(folder)
    if not steps:
        raise ValueError(
            f"ckpt_path=last: there is no checkpoint in {folder}; leave --ckpt_path out to start this run"
        )
    damages: list[str] = []
    for step in reversed(steps):
        path = folder / f"step-{step:06d}.ckpt"
        damage = checkpoint_damage(path)
        if damage is None:
            if damages:
                rank_zero_warn(
                    f"ckpt_path=last: {'; '.join(damages)}. The run resumes from the one before, {path}"
                )
            return path
        damages.append(f"{path} is damaged: {damage}")
    raise ValueError(
        f"ckpt_path=last: {'; '.join(damages)}. None is left: restore one from a copy, or name another "
        "folder with --trainer.default_root_dir to start anew"
    )


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER


def _way_on(folder: Path) -> str:
    steps = checkpoint_steps(folder)
    if not steps:
        return "There is no complete checkpoint yet: the same command starts anew."
    return (
        f"The last complete checkpoint is {folder / f'step-{steps[-1]:06d}.ckpt'}: "
        "continue with --ckpt_path last."
    )


def _abandon_after(step: int, run_folder: Path) -> None:
    """Rename the files of all steps after ``step``, from which the run resumes.

    The resumed run makes its later checkpoints and records anew. The old checkpoints must not count as the
    run's last ones, and must not be pruned together with the new ones. The old records must not be read as
    its results.
    """
    named = [
        run_folder / FOLDER / "step-*.ckpt",
        *(run_folder / name / "step-*.json*" for name in (VALIDATION_FOLDER, ANSWER_FOLDER, ROLLOUT_FOLDER)),
    ]
    files = [
        path
        for pattern in named
        for path in sorted(pattern.parent.glob(pattern.name))
        if path.suffix != _ABANDONED
    ]
    later = [path for path in files if _step_of(path) > step]
    for path in later:
        number, target = 2, path.with_name(path.name + _ABANDONED)
        while target.exists():
            number, target = number + 1, path.with_name(f"{path.name}.{number}{_ABANDONED}")
        path.rename(target)
    if later:
        names = ", ".join(str(path.relative_to(run_folder)) for path in later)
        rank_zero_info(
            f"the run resumes from step {step}; files of later steps are now named *{_ABANDONED}: {names}"
        )


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").split(".")[0])


def _remove(path: Path) -> None:
    """Remove a checkpoint: a file, or a folder if the strategy writes it sharded."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
