"""The rollouts of one step on one rank, and the weights, work and time behind them."""

from __future__ import annotations

import functools
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rpt_lightning.data.modules.stream import Place
from rpt_lightning.objectives.base import Objective
from rpt_lightning.policy.flops import Work
from rpt_lightning.rollout.dynamic_sampling import FilledBatch, fill_batch
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.training.distributed.rank_exchange import RankExchange
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.training.rollouts.metrics import (
    prompt_metrics,
    rollout_metrics,
    rollout_work,
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


class StepRoller:
    """Rolls out steps on one rank.

    Args:
        engine: Holds weights by the time of ``roll_out``.
        rollout: Returns groups for tasks, in task order, by this engine.
        objective: What the groups were rewarded by. Its counts are taken with the step.
        pilot_size: See ``RolloutCallback``.
        dynamic_sampling_from_step: See ``RolloutCallback``.
        dynamic_sampling_max_factor: See ``RolloutCallback``.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        rollout: Callable[[Sequence[Task]], list[RolloutGroup]],
        *,
        objective: Objective,
        pilot_size: int | None,
        dynamic_sampling_from_step: int | None,
        dynamic_sampling_max_factor: float,
    ) -> None:
        self.engine = engine
        self.rollout = rollout
        self.objective = objective
        self.pilot_size = pilot_size
        self.dynamic_sampling_from_step = dynamic_sampling_from_step
        self.dynamic_sampling_max_factor = dynamic_sampling_max_factor

    def max_extra_tasks(self, *, step: int, tasks_per_step: int) -> int:
        """Most tasks that dynamic sampling may draw beyond a step's own, over all ranks."""
        if self.dynamic_sampling_from_step is None or step < self.dynamic_sampling_from_step:
            return 0
        return int((self.dynamic_sampling_max_factor - 1) * tasks_per_step)

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
        metrics |= server_metrics(self.engine.servers)
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
