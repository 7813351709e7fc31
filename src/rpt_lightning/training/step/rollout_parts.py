"""Builds what generates, rewards and checks completions in one fit or validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.pretrained.text_shape import longest_context
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.follow_ups import FollowUpRollout
from rpt_lightning.rollout.pilot import PilotRollout
from rpt_lightning.rollout.position_kinds import KindShares
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.rollout.selection import TaskSelector
from rpt_lightning.rollout.settings import DynamicSampling, EngineCheck, Sampling, Selection
from rpt_lightning.training.distributed.rank_exchange import RankExchange
from rpt_lightning.training.distributed.shared_generation import share_generation
from rpt_lightning.training.engine_check.engine_sync import EngineSync
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.step.async_rollouts import AsyncRollouts
from rpt_lightning.training.step.policy_scores import chances_of_policy, scores_of_policy
from rpt_lightning.training.step.rollout_step import CurrentRollouts, RolloutStep, StepRoller
from rpt_lightning.training.validation.prompt_limits import max_model_len
from rpt_lightning.types import RolloutGroup, SamplingSettings, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutParts:
    """The parts around one engine.

    ``selector`` is None if no tasks are selected, and ``exchange`` unless rollouts are generated ahead of the
    steps.
    """

    rollouter: Rollouter
    sync: EngineSync
    roller: StepRoller
    selector: TaskSelector | None
    exchange: RankExchange | None

    @property
    def sampling(self) -> SamplingSettings:
        """How training rollouts are drawn."""
        return self.rollouter.request_sampling()

    def step(self, *, data: Any, trainer: Trainer, module: PolicyModule, max_staleness: int) -> RolloutStep:
        """Return what gives each training step its rollouts. Call it when the data is at its first place."""
        if self.exchange is None:
            return CurrentRollouts(
                self.roller, self.sync, self.selector, data=data, trainer=trainer, module=module
            )
        return AsyncRollouts(
            self.roller,
            self.sync,
            self.exchange,
            data=data,
            trainer=trainer,
            module=module,
            max_staleness=max_staleness,
        )


def build_parts(
    engine: RolloutEngine,
    objective: BoundObjective,
    *,
    trainer: Trainer,
    module: PolicyModule,
    group_size: int,
    pilot_size: int | None,
    max_prompt_tokens: int,
    seed: int,
    sampling: Sampling,
    dynamic_sampling: DynamicSampling,
    selection: Selection,
    kinds: KindShares | None,
    check: EngineCheck,
    with_controls: bool,
    is_ahead: bool,
) -> RolloutParts:
    """Build the parts. A collective if rollouts are generated ahead.

    Args:
        engine: The engine. It is not started yet.
        objective: The question put to the policy, and its reward.
        trainer: The trainer of the run.
        module: The policy.
        group_size: See `RolloutCallback`, like the next three.
        pilot_size: Completions of the first part of a group.
        max_prompt_tokens: Longest prompt.
        seed: Run seed.
        sampling: How completions are drawn.
        dynamic_sampling: When zero-variance groups are replaced.
        selection: Which tasks are rolled out.
        kinds: Which kinds of positions are preferred. None: none are.
        check: How log-probs are compared.
        with_controls: Whether validations have thought controls, which need some room.
        is_ahead: Whether rollouts are generated ahead of the steps.

    Raises:
        ValueError: Settings do not fit together.
    """
    exchange = RankExchange.over(module.ranks) if is_ahead else None
    rollouter = Rollouter(
        engine,
        objective,
        group_size=group_size,
        sampling=sampling,
        max_prompt_tokens=max_prompt_tokens,
        run_seed=seed,
        masks_truncated=module.masks_truncated,
        score=scores_of_policy(trainer, module) if objective.objective.needs_logprobs else None,
        share_work=lambda generate: share_generation(generate, exchange or module.ranks),
    )
    if rollouter.request_sampling().is_truncating:
        check = _check_of_truncating(sampling, check, module)
    sync = EngineSync(
        rollouter,
        seed=seed,
        max_model_len=max_model_len(
            max_prompt_tokens + sampling.max_completion_tokens,
            positions=longest_context(module.policy.config),
            with_controls=with_controls,
        ),
        check=check,
    )
    roller = StepRoller(
        engine,
        _rollout_of_step(rollouter, pilot_size=pilot_size),
        objective=objective,
        dynamic_sampling=dynamic_sampling,
        pilot_size=pilot_size,
    )
    score = chances_of_policy(trainer, module, objective)
    selector = TaskSelector(selection, score, seed=seed, kinds=kinds) if selection.is_on else None
    return RolloutParts(rollouter=rollouter, sync=sync, roller=roller, selector=selector, exchange=exchange)


def _rollout_of_step(
    rollouter: Rollouter, *, pilot_size: int | None
) -> Callable[[Sequence[Task]], list[RolloutGroup]]:
    """Return how the tasks of a step are rolled out."""
    if rollouter.objective.objective.has_follow_ups:
        return FollowUpRollout(rollouter).rollout
    return rollouter.rollout if pilot_size is None else PilotRollout(rollouter, pilot_size=pilot_size).rollout


def _check_of_truncating(sampling: Sampling, check: EngineCheck, module: PolicyModule) -> EngineCheck:
    """Return the check without log-probs. Those of a truncating sampler are renormalised over its tokens.

    Raises ValueError if the module uses importance ratios, which such log-probs would bias.
    """
    if module.corrects_mismatch:
        raise ValueError(
            f"{sampling.truncation} truncate the distribution, which makes the importance ratios of "
            "model.correction biased; sample with temperature alone (top_p 1, top_k 0, min_p 0) or set "
            "model.correction=none"
        )
    if check.verify_sequences:
        rank_zero_info(
            f"{sampling.truncation}: the sampler truncates, so the engine's log-probs belong to another "
            "distribution than the policy's and are not compared; versions and tensors still are"
        )
    return replace(check, verify_sequences=0)
