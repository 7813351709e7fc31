"""Generates the rollouts of the next steps while the policy trains (`rollout.max_staleness`).

The rule: a batch that will be trained at policy version V is generated only with weights of version
V - max_staleness or later. Versions count optimizer steps, so both versions are known before a batch is
generated and no work is wasted. If a module does more optimizer steps than it announced, groups that come
out too old are dropped and counted, and their tasks are rolled out again.

The engine takes new weights only when it is idle on every rank, between two steps of the trainer. So each
completion comes from a single version. With ``max_staleness`` 1 and one optimizer step per batch the order is
fixed: wait for batch k, sync weights k to the engine, begin batch k + 1, train batch k. With a larger
``max_staleness`` the engine may still be busy between two steps. It then keeps its weights until it is idle,
and the rule bounds how old they get.

A checkpoint holds the place in the data after the last trained batch. A resumed run draws again whatever
had been generated or queued.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from rpt_lightning.data.modules.base import StreamDataModule
from rpt_lightning.data.modules.batch import TaskBatch
from rpt_lightning.objectives.base import Objective
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.settings import Selection
from rpt_lightning.training.distributed.rank_exchange import RankExchange
from rpt_lightning.training.engine_check.engine_sync import EngineSync
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.step.background import Background
from rpt_lightning.training.step.metrics import COSTS
from rpt_lightning.training.step.rollout_step import RolloutStep, StepRoller, StepRollouts
from rpt_lightning.types import Task

STOP_LIMIT_S = 60.0  # an interrupted engine stops at its next token


class AsyncRollouts(RolloutStep):
    """Hands each step its rollouts and generates the next ones in the background.

    The trainer's thread calls it in the same order on every rank. From construction to ``close`` the task
    stream is read in the background.

    Args:
        roller: Generates, in the background.
        sync: Used only while no rank generates.
        exchange: Connects the ranks' background threads.
        data: Source of the tasks.
        trainer: The trainer of the run.
        module: The policy.
        max_staleness: Most policy versions between generation and training.
    """

    def __init__(
        self,
        roller: StepRoller,
        sync: EngineSync,
        exchange: RankExchange,
        *,
        data: StreamDataModule,
        trainer: Trainer,
        module: PolicyModule,
        max_staleness: int,
    ) -> None:
        self.roller = roller
        self.sync = sync
        self.exchange = exchange
        self.data = data
        self.trainer = trainer
        self.module = module
        self.max_staleness = max_staleness
        self._temperature = sync.rollouter.sampling.temperature
        self._ahead: deque[Future[StepRollouts]] = deque()  # begun but not trained, in step order
        data.trained_up_to(data.stream.place)
        self._background: Background[StepRollouts] = Background(
            "rollouts", device=module.device, at_end=exchange.end
        )

    def next(self, tasks: Sequence[Task]) -> StepRollouts:
        """Return the rollouts of the current step. Raises any error of the background thread.

        ``tasks`` is empty, because the background thread reads the stream. Otherwise ValueError is raised.
        """
        if tasks:
            raise ValueError(
                f"rollout.max_staleness={self.max_staleness}: {type(self.data).__name__} puts "
                f"{len(tasks)} tasks into a batch, but the rollouts read the tasks ahead of the steps; leave "
                "its train_dataloader as StreamDataModule has it, or give 0"
            )
        version, clock = self.module.policy_version, self.module.clock
        if not self._ahead:
            self._begin(first=version, try_on=None)
        with clock.phase("rollout"):
            rollouts = self._ahead.popleft().result()
        if version - rollouts.policy_version > self.max_staleness:
            rollouts = self._again(rollouts)
        compared = {}
        if rollouts.policy_version == version:
            with clock.phase("logprob_check"):
                compared = self.sync.check_logprobs(
                    self.trainer, self.module, rollouts.filled.groups, temperature=self._temperature
                )
        compared |= self._begin(
            first=version + self.module.optimizer_steps_per_batch,
            try_on=[group.task for group in rollouts.filled.groups],
        )
        assert rollouts.place is not None
        self.data.trained_up_to(rollouts.place)
        own = {
            "rollout/staleness": float(version - rollouts.policy_version),
            "rollout/dropped_groups": 0.0,
            "time/generation_s": rollouts.seconds,
        }
        return dataclasses.replace(rollouts, metrics=compared | own | rollouts.metrics)

    def drain(self) -> None:
        for batch in self._ahead:
            batch.result()
        self.module.ranks.any(False)  # waits until the other ranks are done as well

    def close(self) -> bool:
        self.roller.engine.interrupt()
        has_stopped = self._background.close(limit_s=STOP_LIMIT_S)
        if not has_stopped:
            rank_zero_warn(
                f"the engine still generates {STOP_LIMIT_S:.0f} s after it was interrupted: "
                "it is abandoned and ends with the process"
            )
        return has_stopped

    def _begin(self, *, first: int, try_on: Sequence[Task] | None) -> dict[str, float]:
        """Sync weights and begin as many batches as the rule allows, unless generation is still running.

        Args:
            first: The version at which the first of all batches ahead is trained.
            try_on: Tasks on which the engine's log-probs are compared with the policy's. None if the first
                batch itself will be compared.

        Returns:
            The metrics of the log-prob comparison. Empty if there was none.
        """
        version, step, end = (
            self.module.policy_version,
            self.module.optimizer_steps_per_batch,
            self.trainer.max_steps,
        )
        versions = [
            trained_at
            for trained_at in range(first + step * len(self._ahead), version + self.max_staleness + 1, step)
            if end < 0 or trained_at < end  # the last steps of the run need no batch ahead
        ]
        if not versions or self.module.ranks.any(not all(batch.done() for batch in self._ahead)):
            return {}
        self.sync.sync(self.module)
        compared = {}
        if try_on is not None:
            with self.module.clock.phase("logprob_check"):
                compared = self.sync.try_out(self.trainer, self.module, try_on)
        self._ahead.extend(
            self._background.submit(functools.partial(self._roll_out_next, trained_at))
            for trained_at in versions
        )
        return compared

    def _again(self, stale: StepRollouts) -> StepRollouts:
        """Roll out the same tasks with the current weights.

        Tasks that dynamic sampling replaced stay replaced.
        """
        groups = stale.filled.groups
        rank_zero_warn(
            f"rollouts of version {stale.policy_version} are dropped at version {self.module.policy_version} "
            f"(rollout.max_staleness={self.max_staleness}): {type(self.module).__name__} does more optimizer "
            f"steps a batch than it announces, {self.module.optimizer_steps_per_batch}"
        )
        with self.module.clock.phase("rollout"):
            self.drain()
        self.sync.sync(self.module)
        with self.module.clock.phase("rollout"):
            fresh = self._background.submit(
                functools.partial(
                    self._roll_out,
                    [group.task for group in groups],
                    step=self.module.policy_version,
                    max_extra_tasks=0,
                )
            ).result()
        spent = {name: fresh.metrics[name] + stale.metrics[name] for name in COSTS if name in fresh.metrics}
        metrics = fresh.metrics | spent | {"rollout/dropped_groups": float(len(groups))}
        return dataclasses.replace(fresh, metrics=metrics, work=fresh.work + stale.work, place=stale.place)

    # In the background

    def _roll_out_next(self, version: int) -> StepRollouts:
        batch = self.data.next_batch()
        assert isinstance(batch, TaskBatch)
        extra = self.roller.dynamic_sampling.max_extra_tasks(
            step=version, tasks_per_step=self.data.items_per_step
        )
        return dataclasses.replace(
            self._roll_out(batch.tasks, step=version, max_extra_tasks=extra), place=self.data.stream.place
        )

    def _roll_out(self, tasks: Sequence[Task], *, step: int, max_extra_tasks: int) -> StepRollouts:
        posed, draw = self.roller.pose(tasks, self.data.draw, step=step)
        return self.roller.roll_out(
            posed, draw, step=step, max_extra_tasks=max_extra_tasks, ranks=self.exchange
        )


def check_settings(
    max_staleness: int,
    engine: RolloutEngine,
    module: PolicyModule,
    objective: Objective,
    data: object,
    *,
    selection: Selection = Selection(),
) -> None:
    """Raise ValueError if the settings are impossible or unsafe with asynchronous rollouts."""
    flag = f"--rollout.max_staleness {max_staleness}"
    if not module.corrects_mismatch:
        raise ValueError(
            f"{flag}: the policy trains on completions of its earlier weights, which biases the loss unless "
            "it is corrected; set --model.correction truncate (or mask), or --rollout.max_staleness 0"
        )
    if engine.sleeps:
        raise ValueError(
            f"{flag}: the engine generates while the policy trains; "
            "set --rollout.engine.sleep_in_training false, or --rollout.max_staleness 0"
        )
    if max_staleness < module.optimizer_steps_per_batch:
        raise ValueError(
            f"{flag}: with --model.optimizer_steps_per_batch {module.optimizer_steps_per_batch} a batch that "
            "is generated while another one trains is already that many versions old when its turn comes; "
            f"give {module.optimizer_steps_per_batch} or more, or 0"
        )
    if objective.needs_logprobs:
        raise ValueError(
            f"{flag}: {type(objective.rewarder).__name__} asks the policy for log-probs while it is trained; "
            "take PrefixMatchReward, or --rollout.max_staleness 0"
        )
    if selection.is_on:
        raise ValueError(
            f"{flag}: rollout.selection asks the policy about tasks while it is trained; leave "
            "--rollout.selection.min_true_prob at 0, max_true_prob at 1 and by_kind false, and choose "
            "positions in `rpt prepare` (--min_true_prob, --max_true_prob); or set --rollout.max_staleness 0"
        )
    if getattr(data, "makes", None) != "tasks":
        raise ValueError(
            f"{flag}: {type(data).__name__} cannot be read ahead of the steps; "
            "give --data TokenTaskDataModule, or --rollout.max_staleness 0"
        )
