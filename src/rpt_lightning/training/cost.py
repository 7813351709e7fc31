"""What a step cost, rollouts included, and a run that ends when it has cost as much as another."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.metrics.flops import forward_flops, num_matrix_params, train_flops
from rpt_lightning.metrics.run_folder import STEP_LOG
from rpt_lightning.metrics.step_log import read_step_log
from rpt_lightning.training.policy_module import PolicyModule

COSTS = {"flops": "cost/flops", "tokens": "cost/tokens", "time": "cost/time_s"}


class StepCost(Callback):
    """Logs each step's cost over all ranks; it stands before the rollout callback, so that rollouts are in it.

    Tokens through the model: prompts that the engine computed (`rollout/prefill_tokens`), sampled ones (`rollout/tokens`), those scored without a gradient
    (`cost/scored_tokens`: the check of log-probs, old log-probs, dense rewards) and those trained (`cost/trained_tokens`), shared prefixes counted once.
    `cost/tokens` is their sum, `cost/flops` weights them (metrics/flops.py). `cost/time_s` is the slowest rank's, without validation and checkpoints.
    """

    def __init__(self) -> None:
        self._start_s = 0.0
        self._num_params = 0
        self._before = (0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._num_params = num_matrix_params(pl_module.policy.model)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._start_s = time.perf_counter()
        self._before = pl_module.num_scored_tokens, pl_module.num_trained_tokens

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, PolicyModule)
        scored = float(pl_module.ranks.sum(pl_module.num_scored_tokens - self._before[0]))
        trained = float(pl_module.ranks.sum(pl_module.num_trained_tokens - self._before[1]))
        generated = 0.0
        if pl_module.learns_from_rollouts:
            generated = sum(trainer.callback_metrics[name].item() for name in ("rollout/prefill_tokens", "rollout/tokens"))
        pl_module.log_step(
            {
                "cost/scored_tokens": scored,
                "cost/trained_tokens": trained,
                "cost/tokens": generated + scored + trained,
                "cost/flops": forward_flops(self._num_params, generated + scored) + train_flops(self._num_params, trained),
                "cost/time_s": float(pl_module.ranks.max(time.perf_counter() - self._start_s)),
            }
        )


class Budget(Callback):
    """Ends a run with the step in which it has cost as much as another run did, for baselines at matched cost.

    Args:
        like: Folder of the run whose whole cost is the budget. None: no budget.
        by: What is matched: model FLOPs, tokens through the model, or seconds of all steps; rollouts are in each of them (docs/decisions.md).
    """

    def __init__(self, like: str | None = None, by: Literal["flops", "tokens", "time"] = "flops") -> None:
        self.like = like
        self.by = by
        self._limit = float("inf")
        self._spent = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.like is None:
            return
        log = Path(self.like) / STEP_LOG
        self._limit = _spent(log, self.by)
        own = Path(trainer.default_root_dir) / STEP_LOG
        self._spent = _spent(own, self.by, last_step=trainer.global_step) if trainer.global_step else 0.0
        rank_zero_info(f"budget: {self._limit:.4g} {self.by}, what {self.like} cost" + (f"; {self._spent:.4g} are spent" if self._spent else ""))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.like is None:
            return
        self._spent += trainer.callback_metrics[COSTS[self.by]].item()
        trainer.should_stop = trainer.should_stop or self._spent >= self._limit

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.like is not None:
            rank_zero_info(f"budget: {self._spent:.4g} of {self._limit:.4g} {self.by} spent in {trainer.global_step} steps")
            if self._spent < self._limit:
                rank_zero_info(
                    "budget: NOT used up, so this run is no baseline at equal cost; raise --trainer.max_steps and go on with --ckpt_path last"
                )


def _spent(log: Path, by: str, *, last_step: int | None = None) -> float:
    """What the steps of a run cost, up to ``last_step``."""
    steps = [metrics for step, metrics in read_step_log(log).items() if last_step is None or step <= last_step]
    if not steps or any(COSTS[by] not in metrics for metrics in steps):
        raise ValueError(f"{log}: not every step says what it cost ({COSTS[by]}), so it is no budget. Is it the log of an earlier version?")
    return sum(metrics[COSTS[by]] for metrics in steps)
