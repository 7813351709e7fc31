"""Ends a run between two steps, with a checkpoint, at a signal or at the request of another callback.

Lightning's own handler for SLURM saves wherever the signal finds the process, even in the middle of an
optimizer step, and under another name. Its handler for SIGTERM takes part in a collective at a moment that
the other ranks do not know of. Here, a signal is only recorded.
"""

from __future__ import annotations

import os
import signal
import subprocess
from types import FrameType
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rpt_lightning.compat.lightning import cluster_environment
from rpt_lightning.training.callbacks.rank_watch import is_lightnings_child
from rpt_lightning.training.checkpoint.callback import RunCheckpoint

# Exit statuses of `rpt fit`, besides 0 (all steps done) and 1 (an error, or Ctrl-C).
# EX_TEMPFAIL: started again, the run continues. Not 0, so that a launcher does not consider the run complete.
STATUS_SIGNAL = 75
STATUS_UNHEALTHY = 3  # ended by `health.stop`


class RunStopped(SystemExit):
    """Ends the process with ``code`` once Lightning has closed everything.

    The checkpoint is already written.
    """


class StopRun(Checkpoint):
    """Ends the run after the current step on SIGTERM or on ``requeue_signal``.

    The run ends with a checkpoint and exit status 75. Under SLURM ``requeue_signal`` also queues the job
    again.

    A signal that arrives during a rollout or an optimizer step waits for the end of that step. One that
    arrives during a validation waits for the end of the step after it. Leave enough time for this between the
    signal and the kill. The class is a ``Checkpoint`` so that Lightning calls it last, after the one that
    saves.

    Args:
        requeue_signal: The signal that SLURM sends before the time limit (``#SBATCH --signal=SIGUSR1@300``).
    """

    def __init__(self, requeue_signal: Literal["SIGUSR1", "SIGUSR2"] = "SIGUSR1") -> None:
        self.requeue_signal = signal.Signals[requeue_signal]
        self._received = 0  # number of the first signal; 0: none
        self._request: tuple[str, int, str] | None = None
        self._handlers: dict[int, Any] = {}  # the handlers that ours replaced

    @staticmethod
    def request(trainer: Trainer, reason: str, *, status: int, way_on: str) -> None:
        """Ask for the end of the run after this step, or before the first one.

        Every rank asks at the same step. ``way_on`` tells the user how to continue.
        """
        (stop,) = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, StopRun))
        stop._request = (reason, status, way_on)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for signum in (signal.SIGTERM, self.requeue_signal):
            self._handlers[signum] = signal.signal(signum, self._note)
        self._end_if_requested(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            # A signal may reach only one rank, or each at another moment. All stop after the same step.
            received = trainer.strategy.reduce(received, reduce_op="max")
        if int(received):
            signum = signal.Signals(int(received))
            self._request = self._request or (
                f"{signum.name} received",
                STATUS_SIGNAL,
                "continue with --ckpt_path last",
            )
        self._end_if_requested(trainer, requeue=int(received) == self.requeue_signal)

    def _end_if_requested(self, trainer: Trainer, *, requeue: bool = False) -> None:
        if self._request is None or 0 < trainer.max_steps <= trainer.global_step:
            return
        reason, status, way_on = self._request
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.save(trainer)
        rank_zero_info(
            f"the run stops after step {trainer.global_step}: {reason}. Exit status {status}; {way_on}."
        )
        if requeue:
            if trainer.is_global_zero:
                _requeue(trainer)
            # SLURM may kill the rank that requeues once another rank ends with this status.
            trainer.strategy.barrier("requeued")
        raise RunStopped(0 if is_lightnings_child(trainer) else status)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, stage="")

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # SIGTERM may follow the requeue signal, which asks for more.
        self._received = self._received or signum


def _requeue(trainer: Trainer) -> None:
    environment = cluster_environment(trainer)
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or (isinstance(environment, SLURMEnvironment) and not environment.auto_requeue):
        return
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        problem = f"exit status {done.returncode} {done.stderr.strip()}" if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem is None:
        rank_zero_info(f"SLURM job {job} is queued again")
    else:
        rank_zero_warn(
            f"`{' '.join(command)}` failed ({problem}): SLURM will not start the run again by itself; "
            "submit it once more"
        )
