"""The part that all ways of training the policy share.

It holds the weights, what a checkpoint says about them, and next-token accuracy on held-out tasks. The
optimizer step is in optimizer_step.py.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rpt_lightning.compat.lightning import callbacks_of, has_trainer
from rpt_lightning.data.modules.batch import HeldOutBatch
from rpt_lightning.flag_bounds import check_number
from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.objectives.next_token import NextTokenObjective
from rpt_lightning.objectives.prompts.template import ContinuationPrompt
from rpt_lightning.objectives.rewards.next_token import PrefixMatchReward
from rpt_lightning.policy.flops import Work, add_works, tree_work
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing.trees import PackedTree
from rpt_lightning.pretrained.specification import tokenizer_hash
from rpt_lightning.records.results import PositionResult
from rpt_lightning.training.checkpoint.callback import save_last_step
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.training.distributed.reduced_metrics import over_ranks
from rpt_lightning.training.distributed.strategy import materialize
from rpt_lightning.training.modules.direct_scores import DirectScore, direct_scores, position_results
from rpt_lightning.training.modules.micro_batches import forward_passes, in_step
from rpt_lightning.training.modules.moments_offload import MomentsOffload, offloaded_moments
from rpt_lightning.training.modules.optimizer_kinds import check_kinds, check_same_kinds, kinds_of
from rpt_lightning.training.modules.optimizer_settings import apply_settings, settings_of
from rpt_lightning.training.modules.precision import check_precision
from rpt_lightning.training.modules.saved_module import CHECKPOINT_KEY, about_policy, saved_entry
from rpt_lightning.training.modules.skipped_steps import SkippedSteps
from rpt_lightning.training.modules.step_cost import StepCost, Works
from rpt_lightning.training.step_clock import StepClock
from rpt_lightning.training.step_meter import StepMeter
from rpt_lightning.training.validation.position_records import unique_results, validation_metrics
from rpt_lightning.training.write_errors import WriteErrors
from rpt_lightning.types import TrainSequence

PROGRESS_BAR_METRICS = (
    "reward/mean",
    "rollout/live_groups_frac",
    "loss/total",
    "val/reasoning/easy/accuracy",
    "val/ntp/easy/accuracy",
)


class PolicyModule(LightningModule, ABC):
    """Base class of the modules that train a policy.

    Optimization is manual, because a step is cut into micro-batches of tokens, not of samples.

    Args:
        policy: The model that is trained.
        optimizer: Optimizer over the policy's parameters, e.g. torch.optim.AdamW.
        lr_scheduler: Learning-rate schedule, advanced once per optimizer step. None keeps the rate constant.
        micro_batch_tokens: Input tokens of one forward and backward pass. Memory and speed depend on it,
            but results do not.
        gradient_clip: Largest global gradient norm (the paper's "actor gradient clip"). 0 turns off clipping.
        max_skipped_steps: A step with a non-finite loss or gradient is skipped. The run stops if this many
            steps are skipped in a row.
        offload_moments: Keep the optimizer's moments in host memory and move them to the device for each
            step. For AdamW this frees twice the memory of the weights, and the weights stay the same.
    """

    learns_from_rollouts = False  # whether training batches need the rollout callback's completions
    optimizer_steps_per_batch = 1
    # Whether it uses importance ratios between policy and engine. A truncating sampler would bias them.
    corrects_mismatch = False
    masks_truncated = False  # whether truncated completions do not count when a group's rewards are compared

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        micro_batch_tokens: int = 16384,
        gradient_clip: float = 0.2,
        max_skipped_steps: int = 3,
        offload_moments: bool = False,
    ) -> None:
        super().__init__()
        if micro_batch_tokens < 1:
            raise ValueError(f"model.micro_batch_tokens={micro_batch_tokens}: a micro-batch needs a token")
        check_number("model.gradient_clip", gradient_clip, least=0, hint="; 0 turns clipping off")
        check_number("model.max_skipped_steps", max_skipped_steps, least=0)
        self.automatic_optimization = False
        self.policy = policy
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.micro_batch_tokens = micro_batch_tokens
        self.gradient_clip = gradient_clip
        self.offload_moments = offload_moments
        self.is_warm = False  # whether the kernels of all lengths are compiled
        self.skipped_steps = SkippedSteps(limit=max_skipped_steps)
        self._write_errors = WriteErrors()
        self._moments: MomentsOffload | None = None
        self._kinds: dict[str, str | None] | None = None  # of optimizer and scheduler
        self._saved_kinds: dict[str, str | None] | None = None  # those of the checkpoint being resumed
        # Of this rank, since the start of the process: by the engine for training, through the policy without
        # a gradient, and with one.
        self.generated_work = self.scored_work = self.trained_work = Work()
        self._loaded_step = 0
        self.clock = StepClock()  # of the current step
        self._cost: StepCost | None = None  # while the module is trained
        self._is_measured = False  # whether the current step has all of its metrics
        self.step_metrics: dict[str, float] = {}  # of the current step so far; callbacks read it at its end
        self.results: list[PositionResult] = []  # of the last validation pass; during one, this rank's part
        self.tokenizer = policy.tokenizer
        self.tokenizer_hash = tokenizer_hash(policy.tokenizer)

    # Weights

    def setup(self, stage: str) -> None:
        check_precision(
            str(self.trainer.precision),
            on_cpu=self.device.type == "cpu",
            gathers_bf16=getattr(self.trainer.strategy, "gather_bf16", False),
            adapter=self.policy.adapter,
        )

    def configure_model(self) -> None:
        materialize(self.policy, self.trainer.strategy if has_trainer(self) else None)

    def on_fit_start(self) -> None:
        rank_zero_info(f"policy: {self.policy.packing}")

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.policy.trained_parameters())
        scheduler = None if self.make_lr_scheduler is None else self.make_lr_scheduler(optimizer)
        check_kinds(optimizer, scheduler)
        if self.offload_moments:
            self._moments = offloaded_moments(optimizer, self.trainer.strategy)
        self._given_settings = settings_of(optimizer)
        self._kinds = kinds_of(optimizer, scheduler)
        if self._saved_kinds is not None:
            check_same_kinds(self._kinds, self._saved_kinds)
        return optimizer if scheduler is None else ([optimizer], [scheduler])

    def on_train_start(self) -> None:
        self.clock.end()  # an earlier run of this module may have ended within a step
        self._is_measured = False
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        apply_settings(optimizer, self._given_settings, is_scheduled=self.make_lr_scheduler is not None)
        if self._moments is not None:
            self._moments.to_host()  # a checkpoint was loaded to the device
        self._cost = StepCost(self.policy.model, self._works)

    @property
    def policy_version(self) -> int:
        """Number of optimizer steps behind the current weights.

        A validation of a checkpoint does not count steps itself, so it uses the checkpoint's step.
        """
        return self.global_step if self.evaluated_ckpt_path is None else self._loaded_step

    @property
    def evaluated_ckpt_path(self) -> str | None:
        """The checkpoint whose weights a validation outside of training evaluates. None if there is none."""
        path = self.trainer.ckpt_path
        return None if path is None or self._is_fitting else str(path)

    @property
    def _is_fitting(self) -> bool:
        return has_trainer(self) and self.trainer.state.fn == TrainerFn.FITTING

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = about_policy(self.policy, tokenizer_hash=self.tokenizer_hash) | {
            "global_step": self.global_step,
            "num_skipped_steps": self.skipped_steps.number,
            "skipped_in_a_row": self.skipped_steps.in_a_row,
            "kinds": self._kinds,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = saved_entry(checkpoint, self.policy)
        self._loaded_step = saved["global_step"]
        self.skipped_steps.number = saved["num_skipped_steps"]
        self.skipped_steps.in_a_row = saved["skipped_in_a_row"]
        # Checkpoints of earlier versions lack this entry.
        self._saved_kinds = saved.get("kinds") if self._is_fitting else None
        # A sharded strategy makes the optimizer before it loads.
        if self._saved_kinds is not None and self._kinds is not None:
            check_same_kinds(self._kinds, self._saved_kinds)

    @property
    def ranks(self) -> Ranks:
        return Ranks(self)

    # A step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.clock.begin()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Train on a batch, then log what the step cost and what callbacks measured of it."""
        self.train_batch(batch, batch_idx)
        assert self._cost is not None
        seconds = over_ranks(self.ranks, self.clock.take(), num_groups=1)
        # Without a rollout callback, nothing is generated.
        generated = ("rollout/prefill_tokens", "rollout/tokens")
        cost = self._cost.take(
            self._works,
            generated_tokens=sum(self.step_metrics.get(name, 0.0) for name in generated),
            seconds=time.perf_counter() - self.clock.start_s,
            ranks=self.ranks,
        )
        self.log_step(seconds | cost)
        # All meters measure before any of them is logged, so that none can depend on another.
        meters = callbacks_of(self.trainer, StepMeter)  # type: ignore[type-abstract]
        measured = [meter.measure(self.trainer, self) for meter in meters]
        for metrics in measured:
            self.log_step(metrics)
        self._is_measured = True

    @property
    def _works(self) -> Works:
        return self.generated_work, self.scored_work, self.trained_work

    @abstractmethod
    def train_batch(self, batch: Any, batch_idx: int) -> None:
        """Do one optimizer step on the batch (or several, see the subclass)."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Forget the step's metrics, and end the run if it cannot write or has skipped too many steps.

        This runs after all callbacks and after the last of a batch's optimizer steps, so a checkpoint saved
        here can be resumed.
        """
        self.step_metrics, self._is_measured = {}, False
        self.clock.end()
        if self.ranks.any(self._write_errors.first is not None):
            save_last_step(self.trainer)
            raise self._write_errors.first or RuntimeError(
                "another rank cannot write into the run folder, and that rank says why"
            )
        if self.skipped_steps.reached_limit:
            save_last_step(self.trainer)
            raise self.skipped_steps.error(self.global_step)

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
        micro_batches = in_step(trees, self.ranks)
        yield from forward_passes(
            self.policy, micro_batches, max_tokens=self.micro_batch_tokens, device=self.device, **options
        )

    def log_step(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Log metrics of the current step, which are already reduced over ranks.

        They are added to ``step_metrics``.

        Raises RuntimeError in ``on_train_batch_end``, where other callbacks may have read them already.
        """
        if self._is_measured:
            raise RuntimeError(
                f"log_step({', '.join(metrics)}) comes after the step has been measured, and other callbacks "
                "may have read its metrics already; make the callback a StepMeter (training/step_meter.py) "
                "and return them from measure"
            )
        with self.clock.phase("log"):
            for name, value in metrics.items():
                # Lightning passes single precision to loggers. The record holds the same numbers.
                rounded = torch.tensor(float(value), dtype=torch.float32).item()
                self.log(name, rounded, on_step=True, on_epoch=False, prog_bar=name in PROGRESS_BAR_METRICS)
                self.step_metrics[name] = rounded

    def written_or_ended(self, what: str) -> AbstractContextManager[None]:
        """Wrap a callback's writing at the end of a step.

        If writing fails, the run ends after all callbacks, with a checkpoint.
        """
        return self._write_errors.kept(what, step=self.global_step)

    # Held-out accuracy

    @cached_property
    def _next_token(self) -> BoundObjective:
        """The objective of a validation for which none is configured. Its prompt is never used."""
        objective = NextTokenObjective(ContinuationPrompt(), PrefixMatchReward())
        return BoundObjective(objective, self.tokenizer)

    def on_validation_end(self) -> None:
        if self._cost is not None:
            self._cost.leave_out(self._works)  # a validation is no part of a step

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
        scores = self.score_direct(sequences)
        self.results += position_results(batch, objective, sequences, scores)

    def on_validation_epoch_end(self) -> None:
        self.results = unique_results(row for rows in self.ranks.gather(self.results) for row in rows)
        for name, value in validation_metrics(self.results).items():
            # Every rank already has the same value. sync_dist only silences Lightning's request for it.
            self.log(name, value, prog_bar=name in PROGRESS_BAR_METRICS, sync_dist=True)

    @torch.no_grad()
    def score_direct(self, sequences: Sequence[TrainSequence]) -> list[DirectScore]:
        """Score answers without a thought. A collective."""
        return direct_scores(sequences, self.score_packed(sequences, predict=True))
