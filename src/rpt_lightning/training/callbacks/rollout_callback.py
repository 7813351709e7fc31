"""Generates completions with an engine, for training and for validation.

The callback owns the engine's life: its settings, its parts (step/rollout_parts.py) and its end. What happens
in a training step is in one place, `RolloutStep.next` (step/rollout_step.py). Its result goes into the batch
as a `TrainBatch`.
"""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.flag_bounds import check_number
from rpt_lightning.objectives.base import BoundObjective, Objective
from rpt_lightning.objectives.thought_budget import ThoughtBudget
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.follow_ups import check_follow_ups
from rpt_lightning.rollout.position_kinds import KindShares
from rpt_lightning.rollout.settings import DynamicSampling, EngineCheck, Evaluation, Sampling, Selection
from rpt_lightning.training.batch_summary import batch_arithmetic
from rpt_lightning.training.checkpoint.callback import saved_when_lost
from rpt_lightning.training.distributed.reduced_metrics import over_ranks
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.step.async_rollouts import check_settings
from rpt_lightning.training.step.metrics import cached_fractions, selection_fractions, throughput
from rpt_lightning.training.step.rollout_parts import RolloutParts, build_parts
from rpt_lightning.training.step.rollout_step import RolloutStep
from rpt_lightning.training.step_meter import StepMeter
from rpt_lightning.training.validation.heldout_answers import heldout_answers
from rpt_lightning.training.validation.prompt_limits import check_prompts
from rpt_lightning.training.validation.question_answers import answer_questions
from rpt_lightning.types import TrainBatch


class RolloutCallback(StepMeter):
    """Generates completions with a rollout engine, for training and validation.

    Args:
        engine: Engine that generates completions. RPT training needs one. With None, only next-token
            prediction without reasoning can be evaluated.
        objective: Defines what the policy is asked and how its answers are rewarded.
        group_size: Number of completions for each task (G).
        max_prompt_tokens: Maximum length of a prompt. A longer prompt is an error. To keep prompts short
            enough, set max_context_tokens of the data module, which truncates contexts.
        seed: Run seed from which every completion's own seed is derived.
        pilot_size: Number of completions that each task gets first, called its pilot. If their rewards
            differ, the group is filled up to ``group_size``. The other groups stay short and give no
            gradient. With None, every task gets a whole group. Pilots change how much each task counts in
            the loss (docs/decisions.md).
        max_staleness: With 0, a step's rollouts come from exactly the policy that trains on them, as in the
            paper. Above 0, the rollouts of the next steps are generated while the policy trains. The weights
            that generated them are then at most this many optimizer steps behind the policy that trains on
            them. A value above 0 needs ``model.correction``.
        sampling: How completions are sampled.
        dynamic_sampling: When zero-variance groups are replaced by groups of new tasks.
        selection: Which tasks are rolled out, given the policy's probability of the true answer.
        check: How the engine's log-probs are compared with the policy's after each weight sync.
        evaluation: What a validation generates besides greedy answers.
        thought_budget: A token budget that falls over the run, and a reward for lengths close to it.
    """

    def __init__(
        self,
        engine: RolloutEngine | None = None,
        objective: Objective | None = None,
        group_size: int = 8,
        max_prompt_tokens: int = 4096,
        seed: int = 0,
        pilot_size: int | None = None,
        max_staleness: int = 0,
        sampling: Sampling = Sampling(),
        dynamic_sampling: DynamicSampling = DynamicSampling(),
        selection: Selection = Selection(),
        check: EngineCheck = EngineCheck(),
        evaluation: Evaluation = Evaluation(),
        thought_budget: ThoughtBudget = ThoughtBudget(),
    ) -> None:
        check_number(
            "rollout.max_staleness", max_staleness, least=0, hint=" (0: rollouts of the current policy)"
        )
        check_number("rollout.max_prompt_tokens", max_prompt_tokens, least=1)
        self.engine = engine
        self.objective = objective
        self.group_size = group_size
        self.max_prompt_tokens = max_prompt_tokens
        self.seed = seed
        self.pilot_size = pilot_size
        self.max_staleness = max_staleness
        self.sampling = sampling
        self.dynamic_sampling = dynamic_sampling
        self.selection = selection
        self.kinds = (
            KindShares(floor=selection.kind_floor, decay=selection.kind_decay) if selection.by_kind else None
        )
        self.check = check
        self.evaluation = evaluation
        self.thought_budget = thought_budget
        self.bound_objective: BoundObjective | None = None
        self.parts: RolloutParts | None = None
        self._step: RolloutStep | None = None  # only during training
        self._step_end: float | None = None  # end of the last step, on the clock of time.perf_counter

    # Life of the engine

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, PolicyModule)
        data: Any = getattr(trainer, "datamodule", None)
        self._bind_objective(pl_module, data)
        trains = stage == "fit" and pl_module.learns_from_rollouts
        if self.engine is None:
            if trains:
                raise ValueError(
                    "rollout.engine is not set, but this module learns from rollouts; "
                    "give one, e.g. --rollout.engine VLLMEngine"
                )
            rank_zero_info("engine: none; validation shows standard next-token prediction only")
            return
        if self.bound_objective is None:
            raise ValueError(
                "rollout.objective is not set: say what the policy is asked and rewarded for, "
                "e.g. --rollout.objective NextTokenObjective"
            )
        self.bound_objective.check_budget(max_completion_tokens=self.sampling.max_completion_tokens)
        _look_at_objective(self.bound_objective, trainer, pl_module, data)
        if trains:
            check_follow_ups(
                self.bound_objective.objective,
                pilot_size=self.pilot_size,
                max_staleness=self.max_staleness,
                selection=self.selection,
            )
        is_ahead = trains and self.max_staleness > 0
        if is_ahead:
            check_settings(
                self.max_staleness,
                self.engine,
                pl_module,
                self.bound_objective.objective,
                data,
                selection=self.selection,
            )
        self.parts = build_parts(
            self.engine,
            self.bound_objective,
            trainer=trainer,
            module=pl_module,
            group_size=self.group_size,
            pilot_size=self.pilot_size,
            max_prompt_tokens=self.max_prompt_tokens,
            seed=self.seed,
            sampling=self.sampling,
            dynamic_sampling=self.dynamic_sampling,
            selection=self.selection,
            kinds=self.kinds,
            check=self.check,
            with_controls=self.evaluation.thought_controls,
            is_ahead=is_ahead,
        )

    def _bind_objective(self, module: PolicyModule, data: Any) -> None:
        if self.objective is not None:
            self.bound_objective = BoundObjective(self.objective, module.tokenizer, self.thought_budget)
            # A user's own data module may lack these methods. Its tasks are then taken as they come.
            if hasattr(data, "use_objective"):
                data.use_objective(self.objective)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.engine is not None and self._end_step():
            self.engine.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, stage="")

    def _end_step(self) -> bool:
        """End the generation for steps that will not come.

        Returns:
            Whether the trainer's thread now has the engine to itself.
        """
        if self._step is not None and self._step.close():
            self._step = None
        return self._step is None

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        if not pl_module.learns_from_rollouts:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert self.bound_objective is not None
        assert self.parts is not None
        check_prompts(data, "train", self.bound_objective, max_prompt_tokens=self.max_prompt_tokens)
        text = batch_arithmetic(
            tasks_per_step=data.items_per_step,
            positions_per_document=data.positions_per_document,
            group_size=self.group_size,
            pilot_size=self.pilot_size,
            max_completion_tokens=self.sampling.max_completion_tokens,
            micro_batch_tokens=pl_module.micro_batch_tokens,
            optimizer_steps_per_batch=pl_module.optimizer_steps_per_batch,
            max_steps=trainer.max_steps,
            world_size=pl_module.ranks.num_data,
            max_staleness=self.max_staleness,
        )
        rank_zero_info(text)
        self._step = self.parts.step(
            data=data, trainer=trainer, module=pl_module, max_staleness=self.max_staleness
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_step()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModule)
        if not pl_module.learns_from_rollouts:
            return
        assert self.parts is not None
        assert self._step is not None
        pl_module.clock.begin()
        pl_module.clock.take()  # discards what came after the last step, such as a validation
        with saved_when_lost(trainer):
            rollouts = self._step.next(batch.tasks)
        filled = rollouts.filled
        batch.rollouts = TrainBatch(groups=filled.groups, sampling=self.parts.sampling)
        pl_module.generated_work += rollouts.work
        metrics = over_ranks(
            pl_module.ranks, rollouts.metrics, num_groups=len(filled.groups) + len(filled.replaced)
        )
        pl_module.log_step(metrics | cached_fractions(metrics) | selection_fractions(metrics))
        self._train_start = time.perf_counter()

    def measure(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        assert isinstance(module, PolicyModule)
        if not module.learns_from_rollouts:
            return {}
        start, now, logged = module.clock.start_s, time.perf_counter(), module.step_metrics
        seconds = {"time/train_s": now - self._train_start, "time/step_s": now - start}
        if self._step_end is not None:
            seconds["time/between_steps_s"] = start - self._step_end
        self._step_end = now
        metrics = over_ranks(module.ranks, seconds, num_groups=1)
        return metrics | throughput(logged | metrics)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.kinds is not None:
            self.kinds.commit()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.kinds is None else {"kinds": self.kinds.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.kinds is not None:
            self.kinds.load_state_dict(state_dict["kinds"])

    # Validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step is not None:
            with saved_when_lost(trainer):
                self._step.drain()
        if self.engine is not None:
            assert self.bound_objective is not None
            check_prompts(
                trainer.datamodule,  # type: ignore[attr-defined]
                "heldout",
                self.bound_objective,
                max_prompt_tokens=self.max_prompt_tokens,
            )

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        batch.objective = self.bound_objective
        if self.bound_objective is not None:
            batch.tasks = self.bound_objective.posed(batch.tasks, step=None)
        if self.engine is None:
            if batch.records == "questions":
                raise ValueError(
                    "rollout.engine is not set, but held-out questions are answered through one; "
                    "give one, e.g. --rollout.engine VLLMEngine"
                )
            return
        assert isinstance(pl_module, PolicyModule)
        with saved_when_lost(trainer):
            batch.answers = self._answers(trainer, pl_module, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.engine is not None:
            self.engine.sleep()

    def _answers(self, trainer: Trainer, module: PolicyModule, batch: Any) -> Any:
        """Answer the batch's questions, or predict at its held-out positions."""
        assert self.parts is not None
        rollouter, sync, evaluation = self.parts.rollouter, self.parts.sync, self.evaluation
        sync.sync(module)
        if batch.records == "questions":
            groups, answers = answer_questions(
                rollouter,
                batch.tasks,
                num_samples=evaluation.samples,
                directly=evaluation.thought_controls,
            )
            temperature = self.sampling.temperature if evaluation.samples else 1.0
            sync.check_logprobs(trainer, module, groups, temperature=temperature)
            return answers
        groups = rollouter.predict(batch.tasks, n=1, temperature=0.0)
        sync.check_logprobs(trainer, module, groups, temperature=1.0)
        return heldout_answers(
            rollouter, groups, num_samples=evaluation.samples, with_controls=evaluation.thought_controls
        )


def _look_at_objective(objective: BoundObjective, trainer: Trainer, module: PolicyModule, data: Any) -> None:
    """Show remarks about the tasks. Raises ValueError if the policy lacks a token of the prompt."""
    prompt = objective.prompt
    module.policy.check_ids(
        prompt.prompt_ids(()) + prompt.answer_open_ids + prompt.answer_close_ids + prompt.stop_token_ids
    )
    if trainer.is_global_zero and hasattr(data, "known_tasks"):
        for remark in objective.objective.remarks(data.known_tasks()):
            rank_zero_info(remark)
