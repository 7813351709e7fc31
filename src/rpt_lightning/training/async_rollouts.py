"""Rollouts of the next steps, generated in the background while the policy trains (`rollout.max_staleness`).

The rule: a batch that is to be trained at policy version V is generated only with weights of version V - max_staleness or later. Versions count optimizer
steps, so both are known before a batch is generated, and nothing is generated in vain. Should a module do more optimizer steps than it announced,
what comes out too old is dropped, counted, and its tasks are rolled out again.

The engine takes weights when it has nothing to do on any rank, between two steps of the trainer. So a completion is of one version, and with
``max_staleness`` 1 (and one optimizer step a batch) the order is fixed: wait for batch k, weights k into the engine, begin batch k + 1, train batch k. With more
the engine may be busy between two steps; it then keeps its weights until it has nothing to do, which the rule bounds.

The place in the data that a checkpoint holds is behind the last batch that was trained. A run that goes on draws again what was generated or queued.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from rpt_lightning.data.answer_datamodule import AnswerTaskDataModule
from rpt_lightning.data.datamodule import TokenTaskDataModule
from rpt_lightning.rollout.engine import RolloutEngine
from rpt_lightning.tasks.reward import Reward
from rpt_lightning.training.background import Background
from rpt_lightning.training.engine_sync import EngineSync
from rpt_lightning.training.policy_module import PolicyModule
from rpt_lightning.training.rank_exchange import RankExchange
from rpt_lightning.training.rollout_metrics import COSTS
from rpt_lightning.training.step_rollouts import StepRoller, StepRollouts
from rpt_lightning.types import Task

STOP_LIMIT_S = 60.0  # an engine that is interrupted stops at its next token


class AsyncRollouts:
    """Called by the trainer's thread, on every rank alike. From its making to ``close`` the task stream is read in the background.

    Args:
        roller: Generates, in the background.
        sync: Used while nothing is generated on any rank.
        exchange: For the ranks' threads in the background.
        data: Where tasks come from.
        trainer: Of the run.
        module: The policy.
        max_staleness: Most policy versions between generation and training.
    """

    def __init__(
        self,
        roller: StepRoller,
        sync: EngineSync,
        exchange: RankExchange,
        *,
        data: TokenTaskDataModule | AnswerTaskDataModule,
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
        self._temperature = sync.rollouter.temperature
        self._ahead: deque[Future[StepRollouts]] = deque()  # begun and not trained, in the order of the steps
        data.trained_up_to(data.stream.place)
        self._background: Background[StepRollouts] = Background(
            "rollouts", device=module.device, at_end=exchange.end
        )

    def next(self) -> StepRollouts:
        """What the step that begins trains. Raises what went wrong in the background."""
        version, clock = self.module.policy_version, self.module.clock
        if not self._ahead:
            self._begin(first=version, try_on=None)
        with clock.phase("rollout"):
            rollouts = self._ahead.popleft().result()
        if version - rollouts.policy_version > self.max_staleness:
            rollouts = self._again(rollouts)
        tasks = [group.task for group in rollouts.filled.groups]
        compared = {}
        if rollouts.policy_version == version:
            with clock.phase("logprob_check"):
                compared = self.sync.check_logprobs(
                    self.trainer, self.module, rollouts.filled.groups, temperature=self._temperature
                )
        compared |= self._begin(first=version + self.module.optimizer_steps_per_batch, try_on=tasks)
        assert rollouts.place is not None
        self.data.trained_up_to(rollouts.place)
        own = {
            "rollout/staleness": float(version - rollouts.policy_version),
            "rollout/dropped_groups": 0.0,
            "time/generation_s": rollouts.seconds,
        }
        return dataclasses.replace(rollouts, metrics=compared | own | rollouts.metrics)

    def drain(self) -> None:
        """Returns when nothing is generated on any rank: until ``next`` is called the trainer's thread may use the engine."""
        for batch in self._ahead:
            batch.result()
        self.module.ranks.any(False)  # the others are done as well

    def close(self) -> bool:
        """Ends what is generated for steps that will not come, and lets go of the engine. False where the engine does not stop. May be called twice."""
        self.roller.engine.interrupt()
        has_stopped = self._background.close(limit_s=STOP_LIMIT_S)
        if not has_stopped:
            rank_zero_warn(
                f"the engine still generates {STOP_LIMIT_S:.0f} s after it was interrupted: it is left to itself and ends with the process"
            )
        return has_stopped

    def _begin(self, *, first: int, try_on: Sequence[Task] | None) -> dict[str, float]:
        """Unless something is generated still: the policy's weights into the engine, and as many batches begun as the rule allows. Returns what the
        comparison of log-probs said, where there was one.

        Args:
            first: The version at which the first of all batches ahead is trained.
            try_on: The engine's log-probs of these tasks are compared with the policy's; None where its first batch will be.
        """
        version, step, end = (
            self.module.policy_version,
            self.module.optimizer_steps_per_batch,
            self.trainer.max_steps,
        )
        versions = [
            trained_at
            for trained_at in range(first + step * len(self._ahead), version + self.max_staleness + 1, step)
            if end < 0 or trained_at < end  # the run's last steps need none ahead
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
        """The same tasks with the present weights; those that dynamic sampling replaced stay replaced."""
        groups = stale.filled.groups
        rank_zero_warn(
            f"rollouts of version {stale.policy_version} are dropped at version {self.module.policy_version} (rollout.max_staleness={self.max_staleness}): "
            f"{type(self.module).__name__} does more optimizer steps a batch than it announces, {self.module.optimizer_steps_per_batch}"
        )
        with self.module.clock.phase("rollout"):
            self.drain()
        self.sync.sync(self.module)
        with self.module.clock.phase("rollout"):
            fresh = self._background.submit(
                functools.partial(self._roll_out, [group.task for group in groups], max_extra_tasks=0)
            ).result()
        spent = {name: fresh.metrics[name] + stale.metrics[name] for name in COSTS if name in fresh.metrics}
        metrics = fresh.metrics | spent | {"rollout/dropped_groups": float(len(groups))}
        return dataclasses.replace(fresh, metrics=metrics, work=fresh.work + stale.work, place=stale.place)

    # In the background

    def _roll_out_next(self, version: int) -> StepRollouts:
        tasks = self.data.next_batch()["tasks"]
        extra = self.roller.max_extra_tasks(step=version, tasks_per_step=self.data.items_per_step)
        return dataclasses.replace(self._roll_out(tasks, max_extra_tasks=extra), place=self.data.stream.place)

    def _roll_out(self, tasks: Sequence[Task], *, max_extra_tasks: int) -> StepRollouts:
        return self.roller.roll_out(
            tasks, self.data.draw, max_extra_tasks=max_extra_tasks, ranks=self.exchange
        )


def check_settings(
    max_staleness: int, engine: RolloutEngine, module: PolicyModule, reward: Reward, data: object
) -> None:
    """Raises ValueError for what asynchronous rollouts cannot do, or must not."""
    flag = f"--rollout.max_staleness {max_staleness}"
    if not module.corrects_mismatch:
        raise ValueError(
            f"{flag}: the policy is trained on completions of its earlier weights, which biases the loss unless it is corrected; set --model.correction "
            "truncate (or mask), or --rollout.max_staleness 0"
        )
    if engine.sleeps:
        raise ValueError(
            f"{flag}: the engine generates while the policy trains; set --rollout.engine.sleep_in_training false, or --rollout.max_staleness 0"
        )
    if max_staleness < module.optimizer_steps_per_batch:
        raise ValueError(
            f"{flag}: with --model.optimizer_steps_per_batch {module.optimizer_steps_per_batch} whatever is generated while a batch is trained is as many "
            f"versions old at its own turn; give {module.optimizer_steps_per_batch} or more, or 0"
        )
    if reward.needs_first_token_probs:
        raise ValueError(
            f"{flag}: {type(reward).__name__} asks the policy for probabilities while it is trained; take PrefixMatchReward, or --rollout.max_staleness 0"
        )
    if not isinstance(data, TokenTaskDataModule | AnswerTaskDataModule):
        raise ValueError(
            f"{flag}: {type(data).__name__} cannot be read ahead of the steps; give --data TokenTaskDataModule, or --rollout.max_staleness 0"
        )
