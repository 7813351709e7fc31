"""The engine's life beside the trainer: weights in after every optimizer step, completions, predictions and rewards into the batch.

The order of a step is: sync (weights, version, verification) -> rollouts -> log-prob check -> training. An engine whose weights are not the policy's is
found by the version it acknowledges, by tensors read back from it, and by its log-probs; each ends the run with an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.dynamic_sampling import fill_batch
from rpt_lightning.rollout.engine import RolloutEngine
from rpt_lightning.rollout.pilot import PilotRollout
from rpt_lightning.rollout.rollouter import FirstTokenProbs, Rollouter
from rpt_lightning.tasks.answer_reward import CountingReward
from rpt_lightning.tasks.objective import BoundObjective, Objective
from rpt_lightning.tasks.token_bytes import TokenBytes
from rpt_lightning.training.arithmetic import batch_arithmetic
from rpt_lightning.training.first_token import first_token_probs
from rpt_lightning.training.heldout_answers import heldout_answers
from rpt_lightning.training.policy_module import PolicyModule
from rpt_lightning.training.prompt_room import check_training_prompts, check_validation_prompts
from rpt_lightning.training.question_answers import answer_questions
from rpt_lightning.training.rollout_metrics import cached_fractions, over_ranks, prompt_metrics, rollout_metrics, rollout_work
from rpt_lightning.training.sync_check import LogprobDiff, check_logprobs, check_weights, compare_logprobs, logprob_limits
from rpt_lightning.types import RolloutGroup, SamplingSettings, Task, TrainBatch, TrainSequence

# Room of a forced thought's prompt: the closing marker and the box's beginning, and an answer (rollout/forced_answer.py).
CONTROL_TOKENS = 64


class RolloutCallback(Callback):
    """Args:
    engine: What generates. None evaluates standard next-token prediction only, and cannot train by reasoning.
    objective: What the policy is asked, and what it is paid for.
    group_size: Completions a task (G).
    temperature: Sampling temperature of training rollouts. Evaluation is greedy.
    max_prompt_tokens: Longest prompt; a longer one is an error (the data module's max_context_tokens cuts contexts).
    max_completion_tokens: Longest completion.
    top_p: Below 1 the sampler truncates, which makes importance ratios biased.
    top_k: Above 0 the sampler truncates.
    min_p: Above 0 the sampler truncates.
    seed: Run seed from which every completion's own seed is derived.
    dynamic_sampling_from_step: From this step on, groups whose rewards are all equal are replaced by new tasks (DAPO; the paper: 500). None: never.
    dynamic_sampling_max_factor: At most so many times the step's tasks are rolled out in all; the equal groups that are left are then kept.
    pilot_size: Completions that each task gets first; only where their rewards differ the group is filled up to ``group_size``, the others stay
        short and dead. None: every task gets a whole group. It changes how much tasks count (docs/decisions.md).
    stop_after_first_box: A completion ends with the token that completes its first box behind the thought, instead of with the policy's own end. A
        change of the paper's rule (docs/decisions.md), for validation too.
    verify_sequences: Fresh completions whose log-probs are compared with the policy's after each sync; 0 turns the comparison off.
    logprob_tolerance: Factor on the limits of that comparison, which are those of the coarser dtype of engine and policy.
    eval_samples: Further completions of each validation position, at ``temperature``, for avg@k and pass@k; 0 draws none. A held-out question is answered
        so many times instead of once, greedily.
    thought_controls: Also answer each validation position after an empty and after a shuffled thought, and each held-out question without a thought.
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
        eval_samples: int = 0,
        thought_controls: bool = False,
    ) -> None:
        if dynamic_sampling_max_factor < 1:
            raise ValueError(
                f"--rollout.dynamic_sampling_max_factor {dynamic_sampling_max_factor}: give 1 (the step's own tasks) or more; to turn dynamic sampling "
                "off set --rollout.dynamic_sampling_from_step null"
            )
        if eval_samples < 0:
            raise ValueError(f"--rollout.eval_samples {eval_samples}: give 0 (none) or more")
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
        self.eval_samples = eval_samples
        self.thought_controls = thought_controls
        self.bound_objective: BoundObjective | None = None
        self.rollouter: Rollouter | None = None
        self.train_rollout: Callable[[Sequence[Task]], list[RolloutGroup]] | None = None
        self._num_weight_checks = 0
        self._step_end: float | None = None  # of the step before, on the clock of time.perf_counter

    @property
    def _sampling(self) -> SamplingSettings:
        assert self.bound_objective is not None
        return SamplingSettings(
            temperature=self.temperature,
            max_tokens=self.max_completion_tokens,
            stop_token_ids=self.bound_objective.prompt.stop_token_ids,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            stop_after_first_box=self.stop_after_first_box,
            think_close=self.bound_objective.prompt.think_close,
        )

    # Life of the engine

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, PolicyModule)
        if self.engine is None:
            if stage == "fit" and getattr(pl_module, "learns_from_rollouts", False):
                raise ValueError("rollout.engine is not set, and this module learns from rollouts; give one, e.g. --rollout.engine VLLMEngine")
            rank_zero_info("engine: none; validation shows standard next-token prediction only")
            return
        if self.objective is None:
            raise ValueError("rollout.objective is not set: say what the policy is asked and paid for, e.g. --rollout.objective Objective")
        self.bound_objective = self.objective.bind(pl_module.tokenizer)
        if pl_module.corrects_mismatch and self._sampling.is_truncating:
            raise ValueError(
                f"rollout.top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p} truncate the distribution, which makes the importance ratios of "
                "model.correction biased; sample with temperature alone (top_p 1, top_k 0, min_p 0) or set model.correction=none"
            )
        if self._sampling.is_truncating and self.verify_sequences:
            rank_zero_info(
                f"rollout.top_p={self.top_p}, top_k={self.top_k}, min_p={self.min_p}: the sampler truncates, so the engine's log-probs are those of another "
                "distribution than the policy's and are not compared; versions and tensors still are"
            )
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
            first_token_probs=self._first_token_probs(trainer, pl_module) if self.objective.reward.needs_first_token_probs else None,
            share_work=pl_module.ranks.shared,
        )
        if self.pilot_size is None:
            self.train_rollout = self.rollouter.rollout
        else:
            self.train_rollout = PilotRollout(self.rollouter, pilot_size=self.pilot_size).rollout

    def _first_token_probs(self, trainer: Trainer, module: PolicyModule) -> FirstTokenProbs:
        token_bytes = TokenBytes(module.tokenizer)

        def probs(tasks: Sequence[Task], predictions: Sequence[Sequence[bytes | None]]) -> list[list[float]]:
            with trainer.precision_plugin.forward_context():
                return first_token_probs(module, token_bytes, tasks, predictions)

        return probs

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.engine is not None:
            self.engine.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, stage="")

    def _sync(self, trainer: Trainer, module: PolicyModule) -> None:
        """Brings the engine to the policy's weights and verifies that it has them."""
        assert self.engine is not None
        if not self.engine.weight_names:
            start = time.perf_counter()
            self.engine.start(module.policy.path, seed=self.seed, max_model_len=self._max_model_len(module))
            rank_zero_info(f"engine: {self.engine.description}, started in {time.perf_counter() - start:.0f} s")
        with module.clock.phase("sync"):
            if self.engine.version != module.policy_version:
                self.engine.update_weights(named_weights(module.policy), version=module.policy_version)
                check_weights(self.engine, named_weights(module.policy), version=module.policy_version, turn=self._num_weight_checks)
                self._num_weight_checks += 1

    def _max_model_len(self, module: PolicyModule) -> int:
        """Tokens of prompt and completion, and some more for thought controls where the model has the positions."""
        needed = self.max_prompt_tokens + self.max_completion_tokens
        positions = int(module.policy.config.max_position_embeddings)
        return max(needed, min(needed + CONTROL_TOKENS, positions)) if self.thought_controls else needed

    # Training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        if not pl_module.learns_from_rollouts:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert self.bound_objective is not None
        check_training_prompts(data, self.bound_objective.prompt, max_prompt_tokens=self.max_prompt_tokens)
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
        )
        rank_zero_info(text)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, PolicyModule)
        if not pl_module.learns_from_rollouts:
            return
        assert self.engine is not None
        assert self.bound_objective is not None
        assert self.train_rollout is not None
        pl_module.clock.take()  # what came after the end of the step before, such as a validation
        self._step_start = time.perf_counter()
        self._sync(trainer, pl_module)
        ranks = pl_module.ranks
        prompts_before = self.engine.prompt_tokens
        with pl_module.clock.phase("rollout"):
            filled = fill_batch(
                self.train_rollout,
                trainer.datamodule.draw,  # type: ignore[attr-defined]
                batch["tasks"],
                max_extra_tasks=self._max_extra_tasks(pl_module, trainer.datamodule.items_per_step),  # type: ignore[attr-defined]
                over_ranks=lambda number: (ranks.gather(number), ranks.data_rank),
            )
        with pl_module.clock.phase("logprob_check"):
            metrics = self._check_logprobs(trainer, pl_module, filled.groups, temperature=self.temperature)
        metrics |= rollout_metrics(filled, pilot_size=self.pilot_size) | prompt_metrics(filled, prompts_before, self.engine.prompt_tokens)
        pl_module.generated_work += rollout_work(filled, prefill_tokens=metrics["rollout/prefill_tokens"])
        if isinstance(self.bound_objective.reward, CountingReward):
            metrics |= self.bound_objective.reward.take_metrics()
        batch["rollouts"] = TrainBatch(groups=filled.groups, sampling=self._sampling)
        metrics = over_ranks(ranks, metrics, num_groups=len(filled.groups) + len(filled.replaced))
        metrics |= cached_fractions(metrics)
        self._rollout_tokens = metrics["rollout/tokens"]
        pl_module.log_step(metrics)
        self._train_start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if "rollouts" in batch:
            assert isinstance(pl_module, PolicyModule)
            now = time.perf_counter()
            seconds = {"time/train_s": now - self._train_start, "time/step_s": now - self._step_start}
            if self._step_end is not None:
                seconds["time/between_steps_s"] = self._step_start - self._step_end
            metrics = over_ranks(pl_module.ranks, seconds | pl_module.clock.take(), num_groups=1)
            metrics["perf/rollout_tokens_per_s"] = self._rollout_tokens / metrics["time/rollout_s"]
            trained = {name: trainer.callback_metrics[f"train/{name}"].item() for name in ("completion_tokens", "groups")}
            metrics["perf/tokens_per_s"] = (self._rollout_tokens + trained["completion_tokens"]) / metrics["time/step_s"]
            metrics["perf/live_groups_per_s"] = trained["groups"] / metrics["time/step_s"]
            pl_module.log_step(metrics)
            self._step_end = now

    def _max_extra_tasks(self, module: PolicyModule, num_tasks: int) -> int:
        """How many tasks dynamic sampling may draw beyond the step's own, of all ranks together."""
        if self.dynamic_sampling_from_step is None or module.global_step < self.dynamic_sampling_from_step:
            return 0
        return int((self.dynamic_sampling_max_factor - 1) * num_tasks)

    @torch.no_grad()
    def _check_logprobs(self, trainer: Trainer, module: PolicyModule, groups: Sequence[RolloutGroup], *, temperature: float) -> dict[str, float]:
        """Compares the engine's log-probs of a few fresh completions with the policy's.

        A sampler that truncates says other log-probs, of what is left renormalised: there is nothing to compare then.
        """
        assert self.engine is not None
        if self.verify_sequences == 0 or self._sampling.is_truncating:
            return {}
        fresh = [(group, completion) for group in groups for completion in group.completions][: self.verify_sequences]
        sequences = [TrainSequence(prompt_ids=group.prompt_ids, target_ids=completion.token_ids) for group, completion in fresh]
        width = max((len(sequence.target_ids) for sequence in sequences), default=0)
        ours, theirs, mask = torch.zeros(len(fresh), width), torch.zeros(len(fresh), width), torch.zeros(len(fresh), width, dtype=torch.bool)
        with trainer.precision_plugin.forward_context():
            device = module.device.type
            policy_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
            for tree, logprobs, _ in module.score_packed(sequences, temperature=temperature):
                rows = tree.unpack(logprobs).cpu()
                for row, index in enumerate(tree.sequence_indices):
                    length = len(sequences[index].target_ids)
                    ours[index, :length] = rows[row, :length]
                    theirs[index, :length] = torch.tensor(fresh[index][1].rollout_logprobs)
                    mask[index, :length] = True
        difference = compare_logprobs(theirs, ours, mask) if fresh else LogprobDiff(mean=0.0, p99=0.0, max=0.0)
        check_logprobs(difference, self._logprob_limits(policy_dtype), version=module.policy_version)
        return {
            "sync/logprob_diff_mean": difference.mean,
            "sync/logprob_diff_p99": difference.p99,
            "sync/logprob_diff_max": difference.max,
        }

    def _logprob_limits(self, policy_dtype: torch.dtype) -> LogprobDiff:
        assert self.engine is not None
        limits = logprob_limits(self.engine.dtype, policy_dtype)
        factor = self.logprob_tolerance
        return LogprobDiff(mean=limits.mean * factor, p99=limits.p99 * factor, max=limits.max * factor)

    # Validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.engine is not None:
            assert self.bound_objective is not None
            check_validation_prompts(trainer.datamodule, self.bound_objective.prompt, max_prompt_tokens=self.max_prompt_tokens)  # type: ignore[attr-defined]

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.engine is None:
            if "questions" in batch:
                raise ValueError(
                    "rollout.engine is not set, and held-out questions are answered through one; give one, e.g. --rollout.engine VLLMEngine"
                )
            return
        assert isinstance(pl_module, PolicyModule)
        assert self.rollouter is not None
        self._sync(trainer, pl_module)
        if "questions" in batch:
            groups, answers = answer_questions(self.rollouter, batch["questions"], num_samples=self.eval_samples, directly=self.thought_controls)
            self._check_logprobs(trainer, pl_module, groups, temperature=self.temperature if self.eval_samples else 1.0)
            batch["answers"] = answers
            return
        groups = self.rollouter.rollout(batch["tasks"], n=1, temperature=0.0)
        self._check_logprobs(trainer, pl_module, groups, temperature=1.0)
        batch["answers"] = heldout_answers(self.rollouter, groups, num_samples=self.eval_samples, with_controls=self.thought_controls)
