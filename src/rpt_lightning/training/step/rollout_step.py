"""What lies between two optimizer steps: `RolloutStep.next` gives a training step its rewarded rollouts.

It does so in this order: weight sync, generation, rewards, dynamic sampling, log-prob check. Three files hold
the details: engine_sync.py (sync and check), rollout/rollouter.py (generation and rewards) and
rollout/dynamic_sampling.py.

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
from rpt_lightning.objectives.base import Objective
from rpt_lightning.policy.flops import Work
from rpt_lightning.rollout.dynamic_sampling import FilledBatch, fill_batch
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.settings import DynamicSampling
from rpt_lightning.training.distributed.rank_exchange import RankExchange
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.training.engine_check.engine_sync import EngineSync
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.step.metrics import (
    prompt_metrics,
    rollout_metrics,
    rollout_work,
    sent_metrics,
    server_metrics,
)
from rpt_lightning.types import PromptTokens, RolloutGroup, Task

Draw = Callable[[Sequence[int]], Sequence[Task]]


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
        data: Source of further tasks.
        trainer: The trainer of the run.
        module: The policy.
    """

    def __init__(
        self,
        roller: StepRoller,
        sync: EngineSync,
        *,
        data: StreamDataModule,
        trainer: Trainer,
        module: PolicyModule,
    ) -> None:
        self.roller = roller
        self.sync = sync
        self.data = data
        self.trainer = trainer
        self.module = module

    def next(self, tasks: Sequence[Task]) -> StepRollouts:
        clock = self.module.clock
        self.sync.sync(self.module)
        with clock.phase("rollout"):
            rollouts = self.roller.roll_out(
                tasks,
                self.data.draw,
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
        return replace(rollouts, metrics=compared | rollouts.metrics)

    def drain(self) -> None:
        pass

    def close(self) -> bool:
        return True


class StepRoller:
    """Rolls out steps on one rank.

    Args:
        engine: Holds weights by the time of ``roll_out``.
        rollout: Returns groups for tasks, in task order, by this engine.
        objective: What the groups were rewarded by. Its counts are taken with the step.
        dynamic_sampling: When zero-variance groups are replaced.
        pilot_size: Completions of the first part of a group. None if groups are drawn whole.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rollout: Callable[[Sequence[Task]], list[RolloutGroup]],
        *,
        objective: Objective,
        dynamic_sampling: DynamicSampling,
        pilot_size: int | None,
    ) -> None:
        self.engine = engine
        self.rollout = rollout
        self.objective = objective
        self.dynamic_sampling = dynamic_sampling
        self.pilot_size = pilot_size

    def roll_out(
        self, tasks: Sequence[Task], draw: Draw, *, max_extra_tasks: int, ranks: Ranks | RankExchange
    ) -> StepRollouts:
        """The groups of a step, with further tasks in place of zero-variance groups. A collective.

        See ``fill_batch``.
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
        metrics |= self.objective.take_metrics([*filled.groups, *filled.replaced])
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
