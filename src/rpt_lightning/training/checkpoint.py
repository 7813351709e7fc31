"""Checkpoints of a run: one file a saved step, complete or absent, the old ones pruned.

Lightning's ModelCheckpoint saves nothing at the end of a run whose steps do not divide evenly, ignores time under manual optimization and writes in place;
this one serializes through the same ``trainer.save_checkpoint``. A file gets its name when it is complete and on the disk, so whatever ends the process, and
whenever, the newest name is a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import copy
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

from rpt_lightning.metrics.run_folder import ANSWER_FOLDER, ROLLOUT_FOLDER, VALIDATION_FOLDER
from rpt_lightning.rollout.engine import EngineLost
from rpt_lightning.training.checkpoint_check import checkpoint_damage
from rpt_lightning.training.checkpoint_io import StreamedCheckpointIO, files_of, flush_to_disk
from rpt_lightning.training.sync_check import SyncError

FOLDER = "checkpoints"
_PARTIAL = ".partial"
_ABANDONED = ".abandoned"


class CheckpointNotWritten(RuntimeError):
    """Says why, and how the run goes on."""


class RunCheckpoint(Checkpoint):
    """Saves ``checkpoints/step-N.ckpt`` in the run folder: model, optimizer, loops and task cursor.

    Args:
        every_n_steps: Optimizer steps between checkpoints; the last step of a run is always saved.
        keep: Number of newest checkpoints that are kept.
        keep_every_n_steps: Steps divisible by this are kept for good, e.g. for a scaling curve. None: only the newest.
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
        self.start_step: int | None = (
            None  # where training began in this process, on every rank; None: not yet
        )
        self._saved_step = 0
        self._step_end: dict[
            str, Any
        ] = {}  # where Lightning's loops and the data stood at the end of the last step
        self._is_as_at_step_end = False  # whether the policy is still what it was then

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # A strategy that writes shards does not use it.
        trainer.strategy.checkpoint_io = StreamedCheckpointIO()
        if stage == TrainerFn.FITTING:
            self._check_same_start(trainer)

    def _check_same_start(self, trainer: Trainer) -> None:
        """Each rank has looked for the last checkpoint by itself, before the ranks met. Raises ValueError, on all of them, where they found different ones."""
        if trainer.world_size == 1:
            return
        found: list[str | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, self.resumes_from and Path(self.resumes_from).name)
        if len(set(found)) > 1:
            ranks = "; ".join(
                f"{name or 'none'}: rank {', '.join(str(rank) for rank, other in enumerate(found) if other == name)}"
                for name in dict.fromkeys(found)
            )
            raise ValueError(
                f"the ranks would start from different checkpoints of {_folder(trainer)} ({ranks}). The run folder must be the same one on every node, and "
                "readable: look at it from each; a network file system may show a new checkpoint half a minute late, then start the run again"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start_step = self._saved_step = trainer.global_step
        self._step_end = {}
        if trainer.is_global_zero:
            _abandon_after(trainer.global_step, Path(trainer.default_root_dir))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step_end = {
            "epoch": trainer.current_epoch,
            "fit_loop": copy.deepcopy(trainer.fit_loop.state_dict()),
        }
        data = trainer.datamodule  # type: ignore[attr-defined]
        if data is not None and (state := data.state_dict()):
            self._step_end["data"] = {type(data).__qualname__: copy.deepcopy(state)}
        self._is_as_at_step_end = True
        if trainer.global_step - self._saved_step >= self.every_n_steps:
            self.save(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._is_as_at_step_end = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Saving is a collective: several ranks save only what ends all of them at one place (`saved_when_lost`).
        if (
            trainer.world_size == 1
            and trainer.state.fn == TrainerFn.FITTING
            and not isinstance(exception, (SystemExit, CheckpointNotWritten))
        ):
            self.save_last_step(trainer)
        # A run that was asked to stop (SystemExit) says so itself, and nothing is said of one that had not begun.
        if self.start_step is not None and not isinstance(exception, (SystemExit, CheckpointNotWritten)):
            rank_zero_info(f"stopped at step {trainer.global_step}. {_way_on(_folder(trainer))}")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # The next step may have begun, or a validation: neither is in the weights.
        if self._step_end:
            checkpoint["epoch"], checkpoint["loops"]["fit_loop"] = (
                self._step_end["epoch"],
                self._step_end["fit_loop"],
            )
            checkpoint |= self._step_end.get("data", {})

    def save(self, trainer: Trainer) -> None:
        """The policy as of the end of its last step, on every rank, while no step changes it. Nothing where that step is saved already."""
        if trainer.global_step <= self._saved_step:
            return
        folder = _folder(trainer)
        path = folder / f"step-{trainer.global_step:06d}.ckpt"
        partial = path.with_name(path.name + _PARTIAL)
        try:
            if trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)  # it may have been deleted since
                _remove(partial)  # of a run that was killed
            trainer.save_checkpoint(partial, weights_only=False)  # the optimizer too
            if trainer.is_global_zero:
                flush_to_disk(files_of(partial))
        except (
            OSError,
            CheckpointException,
        ) as error:  # not a RuntimeError: a collective that fails because a rank died is one
            if trainer.is_global_zero:
                _remove(partial)
            raise CheckpointNotWritten(
                f"cannot write the checkpoint of step {trainer.global_step} into {folder}: {error}. Is the disk full? Make room there "
                f"(a checkpoint holds weights and optimizer) or keep fewer (checkpoint.keep={self.keep}). {_way_on(folder)}"
            ) from error
        if trainer.is_global_zero:
            _remove(path)
            partial.rename(path)
            flush_to_disk([folder])  # the name as well, before an older checkpoint goes
            self._prune(folder)
        trainer.strategy.barrier("checkpoint")
        self._saved_step = trainer.global_step
        rank_zero_info(f"checkpoint: {path}")

    def save_last_step(self, trainer: Trainer) -> None:
        """As ``save``, for a run that ends in the middle of a step: nothing once that step has begun to change the policy, and no error."""
        if self.start_step is None or not self._is_as_at_step_end:
            return
        try:
            self.save(trainer)
        except Exception as failed:  # why the run ends matters more
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
    """For what needs the engine while a run trains: where that is lost or not the policy, on every rank, the last step is saved before the error goes on.

    Not in ``on_exception``: Lightning does not call that in processes that it spawned.
    """
    try:
        yield
    except (EngineLost, SyncError):
        save_last_step(trainer)
        raise


def save_last_step(trainer: Trainer) -> None:
    """What a run that is about to end with an error has done, where it trains. A collective, and no error."""
    for callback in trainer.checkpoint_callbacks if trainer.state.fn == TrainerFn.FITTING else ():
        if isinstance(callback, RunCheckpoint):
            callback.save_last_step(trainer)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.ckpt"))


def last_checkpoint(run_folder: Path) -> Path:
    """The newest checkpoint of a run that is whole.

    A damaged one is passed over with a warning, since the steps after the one before are done again exactly; the run that goes on keeps it
    under another name.

    Raises:
        ValueError: There is none, or all are damaged.
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
                    f"ckpt_path=last: {'; '.join(damages)}. The run goes on from the one before, {path}"
                )
            return path
        damages.append(f"{path} is damaged: {damage}")
    raise ValueError(
        f"ckpt_path=last: {'; '.join(damages)}. None is left: put back a copy of one, or name another folder with --trainer.default_root_dir to start anew"
    )


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER


def _way_on(folder: Path) -> str:
    steps = checkpoint_steps(folder)
    if not steps:
        return "There is no complete checkpoint yet: the same command starts anew."
    return f"The last complete checkpoint is {folder / f'step-{steps[-1]:06d}.ckpt'}: continue with --ckpt_path last."


def _abandon_after(step: int, run_folder: Path) -> None:
    """A run that goes on from an earlier checkpoint makes its later ones anew, and what was recorded of later steps: the old ones must be neither the run's
    last nor pruned against the new, nor be read as its results.
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
            f"beyond step {step}, from which the run goes on, and therefore now named *{_ABANDONED}: {names}"
        )


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").split(".")[0])


def _remove(path: Path) -> None:
    """A checkpoint is a file, or a folder where the strategy writes it sharded."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
