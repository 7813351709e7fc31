"""Drives the engine beside the trainer.

After every optimizer step it syncs the weights to the engine, then puts completions, predictions and rewards
into the batch.

The order of a step is: sync (weights, version, verification) -> rollouts -> log-prob check -> training. With
`max_staleness` the next steps' rollouts are generated during training (async_rollouts.py).
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.objectives.base import BoundObjective, Objective
from rpt_lightning.pretrained.text_shape import longest_context
from rpt_lightning.rollout.engines.base import RolloutEngine
from rpt_lightning.rollout.pilot import PilotRollout
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.training.batch_summary import batch_arithmetic
from rpt_lightning.training.checkpoint.callback import saved_when_lost
from rpt_lightning.training.distributed.rank_exchange import RankExchange
from rpt_lightning.training.distributed.shared_generation import share_generation
from rpt_lightning.training.limits import check_number
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.rollouts.async_rollouts import AsyncRollouts, check_settings
from rpt_lightning.training.rollouts.metrics import cached_fractions, over_ranks, throughput
from rpt_lightning.training.rollouts.policy_scores import scores_of_policy
from rpt_lightning.training.rollouts.step_rollouts import StepRoller, StepRollouts
from rpt_lightning.training.sync.engine_sync import EngineSync
from rpt_lightning.training.validation.heldout_answers import heldout_answers
from rpt_lightning.training.validation.prompt_limits import check_prompts, max_model_len
from rpt_lightning.training.validation.question_answers import answer_questions
from rpt_lightning.types import Task, TrainBatch


class RolloutCallback(Callback):
    """Generates the completions of training and validation with an engine.

    Args:
        engine: Engine that generates. None evaluates standard next-token prediction only, and cannot train by
            reasoning.
        objective: The question put to the policy, and its reward.
        group_size: Completions a task (G).
        temperature: Sampling temperature of training rollouts. Evaluation is greedy.
        max_prompt_tokens: Longest prompt; a longer one is an error (the data module's max_context_tokens cuts
            contexts).
        max_completion_tokens: Longest completion.
        top_p: Below 1 the sampler truncates, which makes importance ratios biased.
        top_k: Above 0 the sampler truncates.
        min_p: Above 0 the sampler truncates.
        seed: Run seed from which every completion's own seed is derived.
        dynamic_sampling_from_step: From this step on, groups whose rewards are all equal are replaced by new
            tasks (DAPO; the paper: 500). None: never.
        dynamic_sampling_max_factor: Most tasks that are rolled out in all, as a multiple of the step's tasks.
            Groups with equal rewards that remain are then kept.
        pilot_size: Completions that each task gets first. Only if their rewards differ is the group filled up
            to ``group_size``; the others stay short and give no gradient. None: every task gets a whole
            group. It changes how much tasks count (docs/decisions.md).
        stop_after_first_box: End a completion with the token that completes its first box after the thought,
            instead of at the policy's own end. This changes the paper's rule (docs/decisions.md), for
            validation too.
        verify_sequences: Fresh completions whose log-probs are compared with the policy's after each sync; 0
            turns the comparison off. If they seem to disagree, 16 times as many are compared, also with
            transformers' own log-probs, before the run ends.
        logprob_tolerance: Factor on the limits of that comparison. The limits are those of the coarser dtype
            of engine and policy.
        max_staleness: 0: a step's rollouts come from the very policy that they train (the paper). Above 0,
            the rollouts of the next steps are generated while the policy trains. Their weights are at most
            this many optimizer steps behind the policy when they are trained. This needs
            ``model.correction``.
        eval_samples: Further completions of each validation position, at ``temperature``, for avg@k and
            pass@k; 0 draws none. A held-out question is answered this many times instead of once greedily.
        thought_controls: Also answer each validation position after an empty thought, a shuffled one and
            filler of equal length, and each held-out question without a thought.
    """

    def __init__(
        self,
        engine: RolloutEngine | None = None,
        objective: Objective | None = None,
        group_size: int = 8,
        temperature: float = 0.8,
        max_prompt_tokens: int = 4096,
        max_completion_tokens: int = 8192,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        dynamic_sampling_from_step: int | None = 500,
        dynamic_sampling_max_factor: float = 4.0,
        pilot_size: int | None = None,
        stop_after_first_box: bool = False,
        verify_sequences: int = 4,
        logprob_tolerance: float = 1.0,
        max_staleness: int = 0,
        eval_samples: int = 0,
        thought_controls: bool = False,
    ) -> None:
        if dynamic_sampling_max_factor < 1:
            raise ValueError(
                f"--rollout.dynamic_sampling_max_factor {dynamic_sampling_max_factor}: give 1 (only the "
                "step's own tasks) or more; to turn dynamic sampling off set "
                "--rollout.dynamic_sampling_from_step null"
            )
        if max_staleness < 0:
            raise ValueError(
                f"--rollout.max_staleness {max_staleness}: give 0 (rollouts of the current policy) or more"
            )
        if eval_samples < 0:
            raise ValueError(f"--rollout.eval_samples {eval_samples}: give 0 (none) or more")
        check_number("rollout.temperature", temperature, least=0)
        check_number("rollout.max_prompt_tokens", max_prompt_tokens, least=1)
        check_number("rollout.max_completion_tokens", max_completion_tokens, least=1)
        check_number("rollout.top_p", top_p, above=0, most=1)
        check_number("rollout.top_k", top_k, least=0)
        check_number("rollout.min_p", min_p, least=0, below=1)
        check_number(
            "rollout.dynamic_sampling_from_step",
            dynamic_sampling_from_step,
            least=0,
            hint=", or null for no dynamic sampling",
        )
        check_number("rollout.dynamic_sampling_max_factor", dynamic_sampling_max_factor, least=1)
        check_number("rollout.verify_sequences", verify_sequences, least=0, hint="; 0 compares no log-probs")
        check_number(
            "rollout.logprob_tolerance",
            logprob_tolerance,
            above=0,
            hint=", a factor on limits; verify_sequences 0 turns them off",
        )
        self.engine = engine
        self.objective = objective
        self.group_size = group_size
        self.temperature = temperature
        self.max_prompt_tokens = max_prompt_tokens
        self.max_completion_tokens = max_completion_tokens
        self.top_p = top_p
        self.top_k = top_k
        self.min_p = min_p
        self.seed = seed
        self.dynamic_sampling_from_step = dynamic_sampling_from_step
        self.dynamic_sampling_max_factor = dynamic_sampling_max_factor
        self.pilot_size = pilot_size
        self.stop_after_first_box = stop_after_first_box
        self.verify_sequences = verify_sequences
        self.logprob_tolerance = logprob_tolerance
        self.max_staleness = max_staleness
        self.eval_samples = eval_samples
        self.thought_controls = thought_controls
        self.bound_objective: BoundObjective | None = None
        self.rollouter: Rollouter | None = None
        self._exchange: RankExchange | None = None  # only in a run with asynchronous rollouts
        self._ahead: AsyncRollouts | None = None
        self._step_end: float | None = None  # end of the last step, on the clock of time.perf_counter

    # Life of the engine

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, PolicyModule)
        data: Any = getattr(trainer, "datamodule", None)
        if self.objective is not None:
            self.bound_objective = BoundObjective(self.objective, pl_module.tokenizer)
            # A user's own data module may lack these methods. Its tasks are then taken as they come.
            if hasattr(data, "use_objective"):
                data.use_objective(self.objective)
        if self.engine is None:
            if stage == "fit" and getattr(pl_module, "learns_from_rollouts", False):
                raise ValueError(
                    "rollout.engine is not set, but this module learns from rollouts; "
                    "give one, e.g. --rollout.engine VLLMEngine"
                )
            rank_zero_info("engine: none; validation shows standard next-token prediction only")
            return
        if self.objective is None or self.bound_objective is None:
            raise ValueError(
                "rollout.objective is not set: say what the policy is asked and rewarded for, "
                "e.g. --rollout.objective NextTokenObjective"
            )
        prompt = self.bound_objective.prompt
        pl_module.policy.check_ids(
            prompt.prompt_ids(()) + prompt.answer_open_ids + prompt.answer_close_ids + prompt.stop_token_ids
        )
        if trainer.is_global_zero and hasattr(data, "known_tasks"):
            for remark in self.objective.remarks(data.known_tasks()):
                rank_zero_info(remark)
        is_async = stage == "fit" and self.max_staleness > 0 and pl_module.learns_from_rollouts
        if is_async:
            check_settings(
                self.max_staleness,
                self.engine,
                pl_module,
                self.objective,
                trainer.datamodule,  # type: ignore[attr-defined]
            )
        self._exchange = RankExchange.over(pl_module.ranks) if is_async else None
        self.rollouter = Rollouter(
            self.engine,
            self.bound_objective,
            group_size=self.group_size,
            temperature=self.temperature,
            max_tokens=self.max_completion_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            stop_after_first_box=self.stop_after_first_box,
            run_seed=self.seed,
            masks_truncated=pl_module.masks_truncated,
            score=scores_of_policy(trainer, pl_module) if self.objective.needs_logprobs else None,
            share_work=lambda generate: share_generation(generate, self._exchange or pl_module.ranks),
        )
        self._sampling = self.rollouter.sampling(
            temperature=self.temperature, max_tokens=self.max_completion_tokens
        )
        if pl_module.corrects_mismatch and self._sampling.is_truncating:
            raise ValueError(
                f"rollout.top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p} truncate the "
                "distribution, which makes the importance ratios of model.correction biased; sample with "
                "temperature alone (top_p 1, top_k 0, min_p 0) or set model.correction=none"
            )
        if self._sampling.is_truncating and self.verify_sequences:
            rank_zero_info(
                f"rollout.top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p}: the sampler truncates, "
                "so the engine's log-probs belong to another distribution than the policy's and are not "
                "compared; versions and tensors still are"
            )
        self._sync = EngineSync(
            self.rollouter,
            seed=self.seed,
            max_model_len=max_model_len(
                self.max_prompt_tokens + self.max_completion_tokens,
                positions=longest_context(pl_module.policy.config),
                with_controls=self.thought_controls,
            ),
            # The log-probs of a truncating sampler are those of the remaining tokens, renormalised.
            verify_sequences=0 if self._sampling.is_truncating else self.verify_sequences,
            logprob_tolerance=self.logprob_tolerance,
        )
        pilot_size = self.pilot_size
        self._roller = StepRoller(
            self.engine,
            self.rollouter.rollout
            if pilot_size is None
            else PilotRollout(self.rollouter, pilot_size=pilot_size).rollout,
            objective=self.objective,
            pilot_size=pilot_size,
            dynamic_sampling_from_step=self.dynamic_sampling_from_step,
            dynamic_sampling_max_factor=self.dynamic_sampling_max_factor,
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.engine is not None and self._end_ahead():
            self.engine.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, stage="")

    def _end_ahead(self) -> bool:
        """Stop rollouts ahead of the trainer.

        Returns:
            Whether the trainer's thread now has the engine to itself.
        """
        if self._ahead is not None and self._ahead.close():
            self._ahead = None
        return self._ahead is None

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        if not pl_module.learns_from_rollouts:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert self.bound_objective is not None
        check_prompts(data, "train", self.bound_objective, max_prompt_tokens=self.max_prompt_tokens)
        text = batch_arithmetic(
            tasks_per_step=data.items_per_step,
            positions_per_document=data.positions_per_document,
            group_size=self.group_size,
            pilot_size=self.pilot_size,
            max_completion_tokens=self.max_completion_tokens,
            micro_batch_tokens=pl_module.micro_batch_tokens,
            optimizer_steps_per_batch=pl_module.optimizer_steps_per_batch,
            max_steps=trainer.max_steps,
            world_size=pl_module.ranks.num_data,
            max_staleness=self.max_staleness,
        )
        rank_zero_info(text)
        if self._exchange is not None:
            self._ahead = AsyncRollouts(
                self._roller,
                self._sync,
                self._exchange,
                data=data,
                trainer=trainer,
                module=pl_module,
                max_staleness=self.max_staleness,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_ahead()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModule)
        if not pl_module.learns_from_rollouts:
            return
        pl_module.clock.take()  # discards what came after the last step, such as a validation
        self._step_start = time.perf_counter()
        with saved_when_lost(trainer):
            rollouts = (
                self._roll_out(trainer, pl_module, batch.tasks) if self._ahead is None else self._ahead.next()
            )
        filled, metrics = rollouts.filled, rollouts.metrics
        pl_module.generated_work += rollouts.work
        batch.rollouts = TrainBatch(groups=filled.groups, sampling=self._sampling)
        metrics = over_ranks(pl_module.ranks, metrics, num_groups=len(filled.groups) + len(filled.replaced))
        metrics |= cached_fractions(metrics)
        self._rollout_tokens = metrics["rollout/tokens"]
        self._generation_s = metrics.get("time/generation_s")
        pl_module.log_step(metrics)
        self._train_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if getattr(batch, "rollouts", None) is not None:
            assert isinstance(pl_module, PolicyModule)
            now = time.perf_counter()
            seconds = {"time/train_s": now - self._train_start, "time/step_s": now - self._step_start}
            if self._step_end is not None:
                seconds["time/between_steps_s"] = self._step_start - self._step_end
            metrics = over_ranks(pl_module.ranks, seconds | pl_module.clock.take(), num_groups=1)
            trained = {
                name: pl_module.step_metrics[f"train/{name}"] for name in ("completion_tokens", "groups")
            }
            metrics |= throughput(
                metrics,
                rollout_tokens=self._rollout_tokens,
                generation_s=self._generation_s,
                trained_tokens=trained["completion_tokens"],
                trained_groups=trained["groups"],
            )
            pl_module.log_step(metrics)
            self._step_end = now

    def _roll_out(self, trainer: Trainer, module: PolicyModule, tasks: tuple[Task, ...]) -> StepRollouts:
        """Roll out the tasks with the very policy that trains on them."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._sync.sync(module)
        with module.clock.phase("rollout"):
            rollouts = self._roller.roll_out(
                tasks,
                data.draw,
                max_extra_tasks=self._roller.max_extra_tasks(
                    step=module.global_step, tasks_per_step=data.items_per_step
                ),
                ranks=module.ranks,
            )
        with module.clock.phase("sync"):
            self._sync.engine.sleep()
        with module.clock.phase("logprob_check"):
            compared = self._sync.check_logprobs(
                trainer, module, rollouts.filled.groups, temperature=self.temperature
            )
        return dataclasses.replace(rollouts, metrics=compared | rollouts.metrics)

    # Validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ahead is not None:
            with saved_when_lost(trainer):
                self._ahead.drain()
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
        if self.engine is not None and self._ahead is None:
            self.engine.sleep()

    def _answers(self, trainer: Trainer, module: PolicyModule, batch: Any) -> Any:
        """Answer the batch's questions, or predict at its held-out positions."""
        assert self.rollouter is not None
        self._sync.sync(module)
        if batch.records == "questions":
            groups, answers = answer_questions(
                self.rollouter,
                batch.tasks,
                num_samples=self.eval_samples,
                directly=self.thought_controls,
            )
            self._sync.check_logprobs(
                trainer, module, groups, temperature=self.temperature if self.eval_samples else 1.0
            )
            return answers
        groups = self.rollouter.rollout(batch.tasks, n=1, temperature=0.0)
        self._sync.check_logprobs(trainer, module, groups, temperature=1.0)
        return heldout_answers(
            self.rollouter, groups, num_samples=self.eval_samples, with_controls=self.thought_controls
        )
