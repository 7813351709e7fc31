"""Logs what a step cost, rollouts included, and ends a run once it has cost as much as another run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.policy.flops import ModelSize, Work, forward_flops, model_size, train_flops
from rpt_lightning.records.run_folder import STEP_LOG
from rpt_lightning.records.step_log import read_step_log
from rpt_lightning.training.modules.policy_module import PolicyModule

COSTS = {"flops": "cost/flops", "tokens": "cost/tokens", "time": "cost/time_s"}


class StepCost(Callback):
    """Logs each step's cost over all ranks, rollouts included.

    `cost/tokens` is the sum of all tokens through the model, with shared prefixes counted once:

    - prompts that the engine computed (`rollout/prefill_tokens`);
    - sampled tokens (`rollout/tokens`);
    - tokens scored without a gradient (`cost/scored_tokens`): selection of tasks, log-prob check, old
      log-probs, dense rewards;
    - trained tokens (`cost/trained_tokens`).

    `cost/flops` counts the model's operations on them (policy/flops.py), and `cost/train_flops` those of
    training alone. `cost/time_s` is the time of the slowest rank, without validation and checkpoints.
    """

    def __init__(self) -> None:
        self._size: ModelSize
        self._before: tuple[Work, ...] = ()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._size = model_size(pl_module.policy.model)
        self._before = _works(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModule)
        # The work is not read here: the rollout callback may have done its part of the step already.
        pl_module.clock.begin()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._before = _works(pl_module)  # a validation is no part of a step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModule)
        works, before = _works(pl_module), self._before
        step = [work + -1 * earlier for work, earlier in zip(works, before, strict=True)]
        self._before = works
        counts = torch.tensor(
            [[work.tokens, work.scored_tokens, work.pairs] for work in step], dtype=torch.float64
        )
        generated, scored, trained = (
            Work(tokens=tokens, scored_tokens=scored_tokens, pairs=pairs)
            for tokens, scored_tokens, pairs in pl_module.ranks.sum(counts).tolist()
        )
        generated_tokens = 0.0
        if pl_module.learns_from_rollouts:
            logged = pl_module.step_metrics
            generated_tokens = logged["rollout/prefill_tokens"] + logged["rollout/tokens"]
        trained_flops = train_flops(self._size, trained)
        pl_module.log_step(
            {
                "cost/scored_tokens": scored.tokens,
                "cost/trained_tokens": trained.tokens,
                "cost/tokens": generated_tokens + scored.tokens + trained.tokens,
                "cost/train_flops": trained_flops,
                "cost/flops": forward_flops(self._size, generated + scored) + trained_flops,
                "cost/time_s": float(pl_module.ranks.max(time.perf_counter() - pl_module.clock.start_s)),
            }
        )


def _works(module: PolicyModule) -> tuple[Work, ...]:
    return module.generated_work, module.scored_work, module.trained_work


class Budget(Callback):
    """Ends a run at the step in which its cost reaches that of another run, for baselines at matched cost.

    Args:
        like: Folder of the run whose total cost is the budget. None means no budget.
        by: Cost to match: model FLOPs, tokens through the model, or seconds of all steps. Each of them
            includes rollouts (docs/decisions.md).
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
