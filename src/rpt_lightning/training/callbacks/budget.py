"""Ends a run once it has cost as much as another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.records.run_folder import STEP_LOG
from rpt_lightning.records.step_log import read_step_log
from rpt_lightning.training.modules.policy_module import PolicyModule

COSTS = {"flops": "cost/flops", "tokens": "cost/tokens", "time": "cost/time_s"}


class Budget(Callback):
    """Ends a run at the step in which its cost reaches that of another run, for baselines at matched cost.

    Args:
        like: Folder of the run whose total cost is the budget. None means no budget.
        by: Cost to match: model FLOPs, tokens that pass through the model, or the total time of all steps.
            Each of these includes rollouts (docs/decisions.md).
    """

    def __init__(self, like: str | None = None, by: Literal["flops", "tokens", "time"] = "flops") -> None:
        self.like = like
        self.by = by
        self._limit = float("inf")
        self._spent = 0.0
        self._spent_before = 0.0  # in earlier starts of this run

    @property
    def is_spent(self) -> bool:
        return self._spent >= self._limit

    @property
    def share_spent(self) -> float | None:
        """The spent share of the budget. None if there is no budget."""
        return None if self.like is None else min(1.0, self._spent / self._limit)

    def seconds_left(self, elapsed_s: float) -> float:
        """Seconds until the budget is spent, at the pace since this start.

        Infinite if there is no budget or nothing has been spent yet.

        Args:
            elapsed_s: Seconds since this start began.
        """
        spent = self._spent - self._spent_before
        return (
            float("inf")
            if self.like is None or spent <= 0
            else elapsed_s * max(0.0, self._limit - self._spent) / spent
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.like is None:
            return
        log = Path(self.like) / STEP_LOG
        self._limit = _spent(log, self.by)
        own = Path(trainer.default_root_dir) / STEP_LOG
        self._spent = _spent(own, self.by, last_step=trainer.global_step) if trainer.global_step else 0.0
        self._spent_before = self._spent
        rank_zero_info(
            f"budget: {self._limit:.4g} {self.by}, the cost of {self.like}"
            + (f"; {self._spent:.4g} are spent" if self._spent else "")
        )
        assert isinstance(pl_module, PolicyModule)
        # The run may be started again although it had ended.
        trainer.should_stop = pl_module.ranks.any(self.is_spent) or trainer.should_stop

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.like is None:
            return
        assert isinstance(pl_module, PolicyModule)
        self._spent += pl_module.step_metrics[COSTS[self.by]]
        # The sums of tensor-parallel ranks differ in the last digits, and all must end at the same step.
        trainer.should_stop = pl_module.ranks.any(self.is_spent) or trainer.should_stop

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.like is not None:
            rank_zero_info(
                f"budget: {self._spent:.4g} of {self._limit:.4g} {self.by} spent in {trainer.global_step} "
                "steps"
            )
            if not self.is_spent:
                rank_zero_info(
                    "budget: NOT used up, so this run is no baseline at equal cost; raise "
                    "--trainer.max_steps and resume with --ckpt_path last"
                )


def _spent(log: Path, by: str, *, last_step: int | None = None) -> float:
    """The cost of a run's steps up to ``last_step``."""
    steps = [
        metrics for step, metrics in read_step_log(log).items() if last_step is None or step <= last_step
    ]
    if not steps or any(COSTS[by] not in metrics for metrics in steps):
        raise ValueError(
            f"{log}: not every step records its cost ({COSTS[by]}), so it cannot be a budget. "
            "Is it the log of an earlier version?"
        )
    return sum(metrics[COSTS[by]] for metrics in steps)
