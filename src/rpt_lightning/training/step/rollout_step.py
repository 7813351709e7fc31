"""What lies between two optimizer steps: `RolloutStep.next` gives a training step its rewarded rollouts.

It does so in this order: selection of tasks, weight sync, generation, rewards, dynamic sampling, log-prob
check. Four files hold the details: rollout/selection.py, engine_sync.py (sync and check),
rollout/rollouter.py (generation and rewards) and rollout/dynamic_sampling.py.

`CurrentRollouts` does all of it before the step trains, as the paper does. `AsyncRollouts`
(async_rollouts.py) generates while earlier steps train.
"""

from __future__ import annotations

import functools
import operator
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lightning.pytorch import Trainer

from rpt_lightning.data.modules.base import StreamDataModule
from rpt_lightning.data.modules.stream import Place
from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.policy.flops import Work
from rpt_lightning.rollout.dynamic_sampling import FilledBatch, fill_batch
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.places import Draw
from rpt_lightning.rollout.selection import TaskSelector
from rpt_lightning.rollout.settings import DynamicSampling
from rpt_lightning.training.distributed.rank_exchange import RankExchange
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.training.engine_check.engine_sync import EngineSync
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.step.metrics import (
    prompt_metrics,
    rollout_metrics,
    rollout_work,
    selection_metrics,
    sent_metrics,
    server_metrics,
)
from rpt_lightning.types import PromptTokens, RolloutGroup, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRollouts:
    """The rollouts of one step. All completions come from ``policy_version``.

    If steps are rolled out ahead, ``place`` is the place in the task stream after everything drawn for this
    step.
    """

    filled: FilledBatch
    metrics: dict[str, float]  # of this rank
    work: Work  # of this rank's engine
    policy_version: int
    seconds: float
    place: Place | None = None


class RolloutStep(ABC):
    """Gives each training step its rollouts. All ranks call it in the same order.

    ``drain`` and ``close`` belong to the engine's life, which the rollout callback owns.
    """

    @abstractmethod
    def next(self, tasks: Sequence[Task]) -> StepRollouts:
        """Return the rollouts that the current step trains. A collective.

        Args:
            tasks: This rank's tasks of the step. None if the task stream is read ahead of the steps.

        Raises:
            SyncError: The engine does not compute with the policy's weights.
            EngineLost: The engine cannot be used any more.
        """

    @abstractmethod
    def drain(self) -> None:
        """Wait until no rank generates. Until ``next`` the trainer's thread may use the engine."""

    @abstractmethod
    def close(self) -> bool:
        """End the generation for steps that will not come. May be called twice.

        Returns:
            Whether the trainer's thread now has the engine to itself.
        """


class CurrentRollouts(RolloutStep):
    """Rolls out the tasks of a step with the very policy that trains on them.

    Args:
        roller: Generates, rewards and replaces zero-variance groups.
        sync: Brings the weights into the engine and compares its log-probs.
        selector: Chooses the tasks that are rolled out. None: all tasks are.
        data: Source of further tasks.
        trainer: The trainer of the run.
        module: The policy.
    """

    def __init__(
        self,
        roller: StepRoller,
        sync: EngineSync,
        selector: TaskSelector | None,
        *,
        data: StreamDataModule,
        trainer: Trainer,
        module: PolicyModule,
    ) -> None:
        self.roller = roller
        self.sync = sync
        self.selector = selector
        self.data = data
        self.trainer = trainer
        self.module = module

    def next(self, tasks: Sequence[Task]) -> StepRollouts:
        clock, step = self.module.clock, self.module.policy_version
        tasks, draw = self.roller.pose(tasks, self.data.draw, step=step)
        if self.selector is not None:
            # Before the sync, which wakes an engine that shares the device's memory with the policy.
            with clock.phase("selection"):
                tasks = self.selector.select(tasks, draw, version=step, over_ranks=self._over_ranks)
            draw = self.selector.selecting(draw, version=step, over_ranks=self._over_ranks)
        self.sync.sync(self.module)
        with clock.phase("rollout"):
            rollouts = self.roller.roll_out(
                tasks,
                draw,
                step=step,
                max_extra_tasks=self.roller.dynamic_sampling.max_extra_tasks(
                    step=self.module.global_step, tasks_per_step=self.data.items_per_step
                ),
                ranks=self.module.ranks,
            )
        with clock.phase("sync"):
            self.sync.engine.sleep()
        with clock.phase("logprob_check"):
            compared = self.sync.check_logprobs(
                self.trainer,
                self.module,
                rollouts.filled.groups,
                temperature=self.sync.rollouter.sampling.temperature,
            )
        metrics = compared | rollouts.metrics
        if self.selector is not None:
            filled = rollouts.filled
            self.selector.learn([*filled.groups, *filled.replaced], gather=self.module.ranks.gather)
            metrics |= selection_metrics(self.selector.take_counts(), self.selector.kinds)
        return replace(rollouts, metrics=metrics)

    def _over_ranks(self, number: int) -> tuple[list[int], int]:
        ranks = self.module.ranks
        return ranks.gather(number), ranks.data_rank

    def drain(self) -> None:
        pass

    def close(self) -> bool:
        return True


class StepRoller:
    """Rolls out steps on one rank.

    Args:
        engine: Holds weights by the time of ``roll_out``.
        rollout: Returns groups for tasks, in task order, by this engine.
        objective: Says how tasks are put to the policy at a step. Its counts are taken with the step.
        dynamic_sampling: When zero-variance groups are replaced.
        pilot_size: Completions of the first part of a group. None if groups are drawn whole.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rollout: Callable[[Sequence[Task]], list[RolloutGroup]],
        *,
        objective: BoundObjective,
        dynamic_sampling: DynamicSampling,
        pilot_size: int | None,
    ) -> None:
        self.engine = engine
        self.rollout = rollout
        self.objective = objective
        self.dynamic_sampling = dynamic_sampling
        self.pilot_size = pilot_size

    def pose(self, tasks: Sequence[Task], draw: Draw, *, step: int) -> tuple[Sequence[Task], Draw]:
        """Return the tasks of a step as they are put to the policy, and a draw of further ones.

        ``step`` is as in ``roll_out``.
        """

        def draw_posed(wanted: Sequence[int]) -> Sequence[Task]:
            return self.objective.posed(draw(wanted), step=step)

        return self.objective.posed(tasks, step=step), draw_posed

    def roll_out(
        self,
        tasks: Sequence[Task],
        draw: Draw,
        *,
        step: int,
        max_extra_tasks: int,
        ranks: Ranks | RankExchange,
    ) -> StepRollouts:
        """The groups of a step, with further tasks in place of zero-variance groups. A collective.

        Args:
            tasks: This rank's tasks of the step, as ``pose`` returns them.
            draw: See ``fill_batch``, like ``max_extra_tasks``.
            step: Optimizer steps before the one that trains the groups. Rollouts ahead know it too.
            max_extra_tasks: Most further tasks.
            ranks: All ranks.
        """
        start, prompts_before, version = time.perf_counter(), self.engine.prompt_tokens, self.engine.version
        filled = fill_batch(
            self.rollout,
            draw,
            tasks,
            max_extra_tasks=max_extra_tasks,
            over_ranks=lambda number: (ranks.gather(number), ranks.data_rank),
        )
        assert version is not None
        metrics = rollout_metrics(filled, pilot_size=self.pilot_size) | prompt_metrics(
            filled, self._read_since(prompts_before, ranks)
        )
        work = rollout_work(filled, prefill_tokens=metrics["rollout/prefill_tokens"])
        metrics |= server_metrics(self.engine.servers) | sent_metrics(self.engine.sent_weights)
        groups = [*filled.groups, *filled.replaced]
        metrics |= self.objective.objective.take_metrics(groups)
        metrics |= self.objective.budget_metrics(groups, step=step, pilot_size=self.pilot_size)
        return StepRollouts(
            filled=filled,
            metrics=metrics,
            work=work,
            policy_version=version,
            seconds=time.perf_counter() - start,
        )

    def _read_since(self, before: PromptTokens | None, ranks: Ranks | RankExchange) -> PromptTokens | None:
        """Prompt tokens since a reading.

        Tensor-parallel ranks divide a step's requests, so their readings add up.
        """
        after = self.engine.prompt_tokens
        if before is None or after is None:
            return None
        return functools.reduce(operator.add, ranks.gather_parts(after - before))
