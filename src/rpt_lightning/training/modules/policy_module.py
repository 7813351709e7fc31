"""The part that all ways of training the policy share.

It holds the weights, the optimizer step over micro-batches, and next-token accuracy on held-out tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rpt_lightning.compat.lightning import has_trainer
from rpt_lightning.data.modules.batch import HeldOutBatch
from rpt_lightning.limits import check_number
from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.policy.flops import Work, add_works, tree_work
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing.trees import PackedTree
from rpt_lightning.policy.parallel.sharding import materialize_sharded
from rpt_lightning.pretrained.specification import has_hash, tokenizer_hash
from rpt_lightning.records.results import PositionResult
from rpt_lightning.training.checkpoint.adapter import about_adapter, check_same_adapter
from rpt_lightning.training.checkpoint.callback import save_last_step
from rpt_lightning.training.checkpoint.file import check_about
from rpt_lightning.training.cpu_precision import bf16_is_slow
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.training.modules.optimizer_kinds import check_kinds, check_same_kinds, kinds_of
from rpt_lightning.training.modules.optimizer_settings import apply_settings, settings_of
from rpt_lightning.training.step_clock import StepClock
from rpt_lightning.training.validation.position_records import (
    position_result,
    unique_results,
    validation_metrics,
)
from rpt_lightning.types import TrainSequence

CHECKPOINT_KEY = "rpt"
PRECISIONS = ("32-true", "bf16-mixed")
PROGRESS_BAR_METRICS = (
    "reward/mean",
    "rollout/live_groups_frac",
    "loss/total",
    "val/reasoning/easy/accuracy",
    "val/ntp/easy/accuracy",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectScore:
    """The policy's answer without a thought.

    ``logprob`` (nats) is that of the true answer. ``is_right`` says whether each of its tokens is the most
    likely one after those before it.
    """

    logprob: float
    is_right: bool


class PolicyModule(LightningModule, ABC):
    """Base of the modules that train a policy.

    Optimization is manual, because a step is cut into micro-batches of tokens, not of samples.

    Args:
        policy: The model that is trained.
        optimizer: Optimizer over the policy's parameters, e.g. torch.optim.AdamW.
        lr_scheduler: Learning-rate schedule, advanced once per optimizer step; None keeps the rate constant.
        micro_batch_tokens: Input tokens of one forward and backward pass. Memory and speed depend on it,
            but results do not.
        gradient_clip: Largest global gradient norm (the paper's "actor gradient clip"); 0 turns off clipping.
        max_skipped_steps: A step with a non-finite loss or gradient is skipped; the run stops when this many
            are skipped in a row.
    """

    learns_from_rollouts = False  # whether training batches need the rollout callback's completions
    optimizer_steps_per_batch = 1
    # Whether it uses importance ratios between policy and engine. A truncating sampler would bias them.
    corrects_mismatch = False
    # Whether it leaves truncated completions out, so that they do not count when a group's rewards are
    # compared.
    masks_truncated = False

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        micro_batch_tokens: int = 16384,
        gradient_clip: float = 0.2,
        max_skipped_steps: int = 3,
    ) -> None:
        super().__init__()
        if micro_batch_tokens < 1:
            raise ValueError(
                f"model.micro_batch_tokens={micro_batch_tokens}: a micro-batch needs at least 1 token"
            )
        check_number("model.gradient_clip", gradient_clip, least=0, hint="; 0 turns clipping off")
        check_number("model.max_skipped_steps", max_skipped_steps, least=0)
        self.automatic_optimization = False
        self.policy = policy
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.micro_batch_tokens = micro_batch_tokens
        self.gradient_clip = gradient_clip
        self.max_skipped_steps = max_skipped_steps
        self.num_skipped_steps = 0
        self._skipped_in_a_row = 0
        self._last_not_finite = ""
        self._not_written: RuntimeError | None = None
        self._kinds: dict[str, str | None] | None = None  # of optimizer and scheduler
        self._saved_kinds: dict[str, str | None] | None = None  # those of the checkpoint being resumed
        # Of this rank, since the start of the process:
        self.generated_work = Work()  # by the engine for training
        self.scored_work = Work()  # through the policy without a gradient
        self.trained_work = Work()  # with one
        self._loaded_step = 0
        self.clock = StepClock()  # of the current step
        # What the current step has logged so far. Callbacks read it at the end of the step.
        self.step_metrics: dict[str, float] = {}
        # Of the last validation pass, from all ranks. During a pass: this rank's part.
        self.results: list[PositionResult] = []
        self.tokenizer = policy.tokenizer
        self.tokenizer_hash = tokenizer_hash(policy.tokenizer)

    # Weights

    def setup(self, stage: str) -> None:
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(
                f"--trainer.precision {self.trainer.precision}: give one of {', '.join(PRECISIONS)}. Master "
                "weights stay in fp32, since a 16-bit weight does not move at RPT's learning rate. Under "
                "16-mixed, gradients would be clipped while they are still scaled with the loss"
            )
        if self.trainer.precision == "bf16-mixed" and self.device.type == "cpu" and bf16_is_slow():
            rank_zero_info(
                "precision: this CPU has no instructions for bf16; --trainer.precision 32-true "
                "(and --rollout.engine.dtype float32) is several times faster"
            )
        adapter = self.policy.adapter
        if (
            adapter is not None
            and adapter.base_dtype == "bfloat16"
            and self.trainer.precision != "bf16-mixed"
        ):
            raise ValueError(
                "model.policy.adapter.base_dtype is bfloat16, but --trainer.precision is "
                f"{self.trainer.precision}; give bf16-mixed, or --model.policy.adapter.base_dtype float32"
            )
        if getattr(self.trainer.strategy, "gather_bf16", False) and self.trainer.precision != "bf16-mixed":
            raise ValueError(
                "trainer.strategy.gather_bf16 computes in bf16, but --trainer.precision is "
                f"{self.trainer.precision}; give bf16-mixed"
            )

    def configure_model(self) -> None:
        strategy: Any = self.trainer.strategy if has_trainer(self) else None
        if isinstance(strategy, ModelParallelStrategy):
            materialize_sharded(
                self.policy,
                strategy.device_mesh,
                device=strategy.root_device,
                cpu_offload=getattr(strategy, "cpu_offload", False),
                gather_bf16=getattr(strategy, "gather_bf16", False),
            )
        else:
            self.policy.materialize()

    def on_fit_start(self) -> None:
        rank_zero_info(f"policy: {self.policy.packing}")

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.policy.trained_parameters())
        scheduler = None if self.make_lr_scheduler is None else self.make_lr_scheduler(optimizer)
        check_kinds(optimizer, scheduler)
        self._given_settings = settings_of(optimizer)
        self._kinds = kinds_of(optimizer, scheduler)
        if self._saved_kinds is not None:
            check_same_kinds(self._kinds, self._saved_kinds)
        return optimizer if scheduler is None else ([optimizer], [scheduler])

    def on_train_start(self) -> None:
        self.clock.end()  # an earlier run of this module may have ended within a step
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        apply_settings(optimizer, self._given_settings, is_scheduled=self.make_lr_scheduler is not None)

    @property
    def policy_version(self) -> int:
        """Number of optimizer steps behind the current weights.

        A validation of a checkpoint does not count steps itself, so it uses the checkpoint's step.
        """
        return self.global_step if self.evaluated_ckpt_path is None else self._loaded_step

    @property
    def evaluated_ckpt_path(self) -> str | None:
        """The checkpoint whose weights a validation outside of training evaluates. None if there is none."""
        is_training = self.trainer.state.fn == TrainerFn.FITTING
        return None if is_training or self.trainer.ckpt_path is None else str(self.trainer.ckpt_path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = {
            "policy_path": self.policy.path,
            "policy_config": self.policy.config.to_json_string(),
            "tokenizer_hash": self.tokenizer_hash,
            "weight_shapes": self.policy.saved_shapes(),
            "global_step": self.global_step,
            "num_skipped_steps": self.num_skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "kinds": self._kinds,
            **about_adapter(self.policy),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None:
            raise ValueError(
                "ckpt_path: this is not a checkpoint of rpt-lightning; give a file from a run folder's "
                "checkpoints/"
            )
        check_about(saved, "ckpt_path", resumes=True)
        check_same_adapter(saved, self.policy, "ckpt_path")
        # The checkpoint's "state_dict" is not available: a sharded strategy removes it before this call.
        if (
            not has_hash(self.tokenizer, saved["tokenizer_hash"])
            or saved["weight_shapes"] != self.policy.saved_shapes()
        ):
            raise ValueError(
                f"ckpt_path: the checkpoint holds the model of {saved['policy_path']}, but the config has "
                f"model.policy.path={self.policy.path}, and their tokenizers or weight shapes differ; give "
                "the checkpoint's own model, or another checkpoint"
            )
        self._loaded_step = saved["global_step"]
        self.num_skipped_steps = saved["num_skipped_steps"]
        self._skipped_in_a_row = saved["skipped_in_a_row"]
        is_training = has_trainer(self) and self.trainer.state.fn == TrainerFn.FITTING
        # Checkpoints of earlier versions lack this entry.
        self._saved_kinds = saved.get("kinds") if is_training else None
        # A sharded strategy makes the optimizer before it loads.
        if self._saved_kinds is not None and self._kinds is not None:
            check_same_kinds(self._kinds, self._saved_kinds)

    @property
    def ranks(self) -> Ranks:
        return Ranks(self)

    # The optimizer step

    def optimizer_step_over(
        self, sequences: list[TrainSequence], micro_batch_loss: Callable[[PackedTree], Tensor]
    ) -> dict[str, Tensor]:
        """One optimizer step on a loss that is a sum over the packed trees of ``sequences``.

        Args:
            sequences: Sequences to train on.
            micro_batch_loss: Returns a tree's share of the loss. The shares of all trees and ranks add up to
                the step's loss, so results do not depend on how the step is cut.

        Returns:
            Metrics. They include the computed tokens (without padding) and the gradient norm before clipping.
        """
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss_sum = torch.zeros((), device=self.device)
        with self.clock.phase("pack"):
            trees = list(self.policy.pack(sequences, max_tokens=self.micro_batch_tokens))
        # Every rank takes part in the collectives of every micro-batch. A step with nothing to learn must
        # give a zero gradient, not a missing one.
        num_micro_batches = max(1, int(self.ranks.max(len(trees))))
        with self.clock.phase("forward_backward"):
            for index in range(num_micro_batches):
                loss = (
                    micro_batch_loss(trees[index].to(self.device))
                    if index < len(trees)
                    else self._idle_loss()
                )
                # Gradients are averaged over ranks, but the loss is a sum over them.
                self.manual_backward(loss * self.ranks.num_data)
                loss_sum += loss.detach()
        work = add_works(map(tree_work, trees))
        self.trained_work += work
        plain_tokens = sum(sequence.num_tokens for sequence in sequences)
        metrics = {
            "loss/total": self.ranks.sum(loss_sum),
            "train/packed_tokens": self.ranks.sum(work.tokens),
            "train/plain_tokens": self.ranks.sum(plain_tokens),
            "train/micro_batches": torch.tensor(float(num_micro_batches)),
        }
        with self.clock.phase("optimizer"):
            metrics["optim/grad_norm"] = self._clip_and_step(optimizer, metrics["loss/total"])
        metrics["optim/lr"] = torch.tensor(float(optimizer.param_groups[0]["lr"]))
        metrics["optim/skipped_steps"] = torch.tensor(float(self.num_skipped_steps))
        if self.lr_schedulers() is not None:
            self.lr_schedulers().step()  # type: ignore[union-attr]
        return metrics

    def _clip_and_step(self, optimizer: Any, loss: Tensor) -> Tensor:
        clip = self.gradient_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if torch.isfinite(norm) and torch.isfinite(loss):
            self._skipped_in_a_row = 0
        else:
            # A step without gradients leaves every weight and moment unchanged, but still counts as a step.
            optimizer.zero_grad(set_to_none=True)
            self.num_skipped_steps += 1
            self._skipped_in_a_row += 1
            self._last_not_finite = f"loss {loss.item()} and gradient norm {norm.item()}"
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Forget the step's metrics, and end the run if it cannot write or has skipped too many steps.

        This runs after all callbacks and after the last of a batch's optimizer steps, so a checkpoint saved
        here can be resumed.
        """
        self.step_metrics = {}
        self.clock.end()
        if self.ranks.any(self._not_written is not None):
            save_last_step(self.trainer)
            raise self._not_written or RuntimeError(
                "another rank cannot write into the run folder, and that rank says why"
            )
        if self._skipped_in_a_row >= self.max_skipped_steps:
            save_last_step(self.trainer)
            raise RuntimeError(
                f"{self._last_not_finite} at step {self.global_step}: {self._skipped_in_a_row} steps in a "
                "row were not finite, so the run stops; they changed no weight. Resume from the last "
                "checkpoint with a lower model.optimizer.lr, or look at the samples of these steps"
            )

    def score_packed(
        self, sequences: Sequence[TrainSequence], **options: Any
    ) -> Iterator[tuple[PackedTree, Tensor, Tensor]]:
        """Yield each packed tree with the outputs of the policy's ``forward``. Always exhaust the iterator.

        A forward pass of sharded weights is a collective, so a rank with fewer trees, or with none, takes
        part in those of the others.

        Args:
            sequences: Sequences to score.
            options: Passed on to ``forward``.
        """
        trees = list(self.policy.pack(sequences, max_tokens=self.micro_batch_tokens))
        self.scored_work += add_works(map(tree_work, trees))
        for index in range(int(self.ranks.max(len(trees)))):
            if index < len(trees):
                tree = trees[index].to(self.device)
                yield (tree, *self.policy(tree, **options))
            else:
                self._idle_loss()

    def _idle_loss(self) -> Tensor:
        """A loss of 0 that touches every weight, for a micro-batch in which this rank has no work."""
        (tree,) = self.policy.pack([TrainSequence(prompt_ids=(0,), target_ids=(0,))], max_tokens=1)
        return cast(Tensor, self.policy(tree.to(self.device))[0].sum() * 0.0)

    def log_step(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Log metrics of the current step, which are already reduced over ranks.

        They are added to ``step_metrics``.
        """
        with self.clock.phase("log"):
            for name, value in metrics.items():
                # Lightning passes single precision to loggers. The record holds the same numbers.
                rounded = torch.tensor(float(value), dtype=torch.float32).item()
                self.log(name, rounded, on_step=True, on_epoch=False, prog_bar=name in PROGRESS_BAR_METRICS)
                self.step_metrics[name] = rounded

    @contextmanager
    def written_or_ended(self, what: str) -> Iterator[None]:
        """Wrap a callback's writing at the end of a step.

        If writing fails, the run ends after all callbacks, with a checkpoint.
        """
        try:
            yield
        except OSError as error:
            self._not_written = self._not_written or RuntimeError(
                f"cannot write {what} at step {self.global_step}: {error}. Is the disk full, or was the run "
                "folder deleted or moved during the run?"
            )

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do one optimizer step (or several, see the subclass)."""

    # Held-out accuracy

    @cached_property
    def _next_token(self) -> BoundObjective:
        """The objective of a validation for which none is configured. Its prompt is never used."""
        objective = NextTokenObjective(ContinuationPrompt(), PrefixMatchReward())
        return BoundObjective(objective, self.tokenizer)

    def on_validation_epoch_start(self) -> None:
        self.results = []

    @torch.no_grad()
    def validation_step(self, batch: HeldOutBatch, batch_idx: int) -> None:
        """Measure accuracy at held-out positions.

        Accuracy without reasoning is always measured, and by reasoning if the rollout callback put
        ``answers`` into the batch. Without an objective, the next token is asked for. Callbacks answer and
        record held-out questions (training/callbacks/answer_results.py).
        """
        if batch.records != "positions":
            return
        objective = batch.objective or self._next_token
        sequences = [objective.direct_sequence(task) for task in batch.tasks]
        self.results += [
            position_result(
                task,
                objective,
                ntp_correct=score.is_right,
                ntp_logprob=score.logprob,
                context_tokens=len(sequence.prompt_ids),
                answer=None if batch.answers is None else batch.answers[i],
            )
            for i, (task, sequence, score) in enumerate(
                zip(batch.tasks, sequences, self.score_direct(sequences), strict=True)
            )
        ]

    def on_validation_epoch_end(self) -> None:
        self.results = unique_results(row for rows in self.ranks.gather(self.results) for row in rows)
        for name, value in validation_metrics(self.results).items():
            # Every rank already has the same value. sync_dist only silences Lightning's request for it.
            self.log(name, value, prog_bar=name in PROGRESS_BAR_METRICS, sync_dist=True)

    @torch.no_grad()
    def score_direct(self, sequences: Sequence[TrainSequence]) -> list[DirectScore]:
        """Score answers without a thought. A collective."""
        scores = [DirectScore(logprob=0.0, is_right=False)] * len(sequences)
        for tree, logprobs, likely in self.score_packed(sequences, predict=True):
            # Several documents may share a context and differ in what follows. Each row is one sequence.
            for row, index in enumerate(tree.sequence_indices):
                places = tree.rows[row][tree.mask[row]]
                scores[index] = DirectScore(
                    logprob=logprobs[places].sum().item(),
                    is_right=tuple(likely[places].tolist()) == sequences[index].target_ids,
                )
        return scores
