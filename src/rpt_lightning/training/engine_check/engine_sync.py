"""Syncs the policy's weights to the engine and proves that the engine computes with them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from rpt_lightning.policy.weights import adapter_weights, named_weights
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.rollout.settings import EngineCheck
from rpt_lightning.training.engine_check.logprob_diff import (
    LogprobDiff,
    exceeded,
    has_heavy_tail,
    logprob_limits,
)
from rpt_lightning.training.engine_check.logprob_recheck import CloserLook, folder_contradiction
from rpt_lightning.training.engine_check.logprob_samples import (
    Scored,
    drawn_completions,
    drawn_tokens,
    score_samples,
)
from rpt_lightning.training.engine_check.sync_check import (
    SyncError,
    check_adapter,
    check_weights,
    sampled_names,
)
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.types import RolloutGroup, Task

# Length of a completion that is drawn only to compare its log-probs.
TRIAL_TOKENS = 32
# Tokens that a rank compares after each sync, drawn from all tokens of `verify_sequences` completions. With a
# fixed number the limits mean the same for any completion length.
MAX_TOKENS = 4096
# A closer look takes this many times as many completions.
CLOSER_LOOK = 16
METRICS = (
    *(f"sync/logprob_diff_{name}" for name in ("mean", "median", "p99", "max")),
    "sync/logprob_outlier_frac",
    "sync/compared_tokens",
    "sync/closer_looks",
)


class EngineSync:
    """Syncs weights and raises SyncError if the engine does not hold the policy's weights.

    There are three checks: the version that the engine acknowledges, tensors that are read back from it, and
    its log-probs. If one rank finds an error, every rank raises SyncError, so that a checkpoint can still be
    written.

    Args:
        rollouter: Holds the engine.
        seed: Run seed.
        max_model_len: Tokens of prompt and completion together.
        check: How log-probs are compared.
    """

    def __init__(
        self,
        rollouter: Rollouter,
        *,
        seed: int,
        max_model_len: int,
        check: EngineCheck,
    ) -> None:
        self.rollouter = rollouter
        self.engine = rollouter.engine
        self.seed = seed
        self.max_model_len = max_model_len
        self.check = check
        self._num_weight_checks = 0
        self._adapter: dict[str, Tensor] = {}  # as it was last sent
        self._num_closer_looks = 0
        self._has_warned_of_tail = False

    def sync(self, module: PolicyModule) -> None:
        """Start the engine if necessary, and bring it to the policy's version. A collective."""
        if not self.engine.weight_names:
            start = time.perf_counter()
            self.engine.start(module.policy.model_path, seed=self.seed, max_model_len=self.max_model_len)
            rank_zero_info(
                f"engine: {self.engine.description}, started in {time.perf_counter() - start:.0f} s"
            )
        with module.clock.phase("sync"):
            if self.engine.version != module.policy_version:
                if self._sends_adapter:
                    self._update_adapter(module)
                else:
                    self.engine.update_weights(named_weights(module.policy), version=module.policy_version)
                self._check_weights(module)
                self._num_weight_checks += 1

    @property
    def _sends_adapter(self) -> bool:
        return self.engine.max_adapter_rank is not None

    def _update_adapter(self, module: PolicyModule) -> None:
        """Send the adapter alone, and before it the base's weights if the engine lacks them. A collective."""
        if module.policy.adapter is None:
            raise ValueError(
                f"rollout.engine.max_adapter_rank={self.engine.max_adapter_rank}: the policy has no adapter; "
                "leave the flag out, or set model.policy.adapter"
            )
        self._adapter = adapter_weights(module.policy)
        self.engine.update_adapter(
            self._adapter, base=named_weights(module.policy, merge=False), version=module.policy_version
        )

    def _check_weights(self, module: PolicyModule) -> None:
        """Raise SyncError if sampled tensors of the engine are not the policy's. A collective.

        Of an adapter that is synced alone, all tensors are compared, and sampled ones of the base.
        """
        found: SyncError | None = None
        # Gathers again, but only the weights that are compared.
        sampled = named_weights(
            module.policy,
            sampled_names(self.engine.weight_names, self._num_weight_checks),
            merge=not self._sends_adapter,
        )
        try:
            check_weights(self.engine, sampled, version=module.policy_version, turn=self._num_weight_checks)
            if self._sends_adapter:
                check_adapter(self.engine, self._adapter, version=module.policy_version)
        except SyncError as error:
            found, contradiction = error, folder_contradiction(module.policy)
            if contradiction is not None:
                found = SyncError(f"{contradiction}. Found at {error}", culprit="folder")
        self._end_together(module, found)

    @staticmethod
    def _end_together(module: PolicyModule, found: SyncError | None) -> None:
        """Raise SyncError on every rank if any rank found an error. A collective."""
        if module.ranks.any(found is not None):
            reports = [
                report for report in module.ranks.gather(found and (str(found), found.culprit)) if report
            ]
            message, culprit = reports[0] if reports else ("that rank reports the error", "engine")
            raise found or SyncError(f"on another rank: {message}", culprit=culprit)

    def try_out(self, trainer: Trainer, module: PolicyModule, tasks: Sequence[Task]) -> dict[str, float]:
        """Like ``check_logprobs``, on the beginnings of completions that are drawn only for this.

        Used when the trained completions come from earlier weights.
        """
        tasks = tasks[: self.check.verify_sequences]
        completions = self.rollouter.complete(
            tasks,
            [0] * len(tasks),
            1,
            max_tokens=min(TRIAL_TOKENS, self.rollouter.sampling.max_completion_tokens),
        )
        return self.check_logprobs(
            trainer,
            module,
            self.rollouter.groups(tasks, completions),
            temperature=self.rollouter.sampling.temperature,
        )

    @torch.no_grad()
    def check_logprobs(
        self, trainer: Trainer, module: PolicyModule, groups: Sequence[RolloutGroup], *, temperature: float
    ) -> dict[str, float]:
        """Compare the engine's log-probs of a few completions with the policy's. A collective.

        The completions must come from the current weights. If the two disagree, more of the completions are
        scored, also by transformers itself (logprob_recheck.py), before SyncError is raised.
        """
        if self.check.verify_sequences == 0:
            return {}
        version = module.policy_version
        few = drawn_completions(groups, self.check.verify_sequences, seed=(self.seed, version))
        scored, policy_dtype = score_samples(trainer, module, few, temperature=temperature)
        difference = self._difference(scored, version)
        limits = logprob_limits(self.engine.dtype, policy_dtype).times(self.check.logprob_tolerance)
        if module.ranks.any(difference is not None and bool(exceeded(difference, limits))):
            self._look_closer(trainer, module, groups, temperature=temperature)
        elif difference is not None and has_heavy_tail(difference, limits) and not self._has_warned_of_tail:
            self._has_warned_of_tail = True
            rank_zero_warn(
                f"version {version}: the log-probs of single tokens differ much between engine and policy "
                f"(the largest of {difference.num_tokens} by {difference.max:.2g} nats), the mean does not "
                f"({difference.mean:.2g}). Rare tokens may do so in bf16; sync/logprob_outlier_frac counts "
                "them. This warning appears once"
            )
        if difference is None:
            return dict.fromkeys(METRICS, 0.0) | {"sync/closer_looks": float(self._num_closer_looks)}
        return {
            "sync/logprob_diff_mean": difference.mean,
            "sync/logprob_diff_median": difference.median,
            "sync/logprob_diff_p99": difference.p99,
            "sync/logprob_diff_max": difference.max,
            "sync/logprob_outlier_frac": difference.num_above(limits.p99) / difference.num_tokens,
            "sync/compared_tokens": float(difference.num_tokens),
            "sync/closer_looks": float(self._num_closer_looks),
        }

    def _difference(self, scored: Scored, version: int) -> LogprobDiff | None:
        """None if there is nothing to compare."""
        values = (scored.engine - scored.policy).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        if values.isfinite().all():  # else the draw might miss the values that are not
            values = values[drawn_tokens(values.numel(), MAX_TOKENS, seed=(self.seed, version))]
        return LogprobDiff(values) if values.numel() else None

    def _look_closer(
        self, trainer: Trainer, module: PolicyModule, groups: Sequence[RolloutGroup], *, temperature: float
    ) -> None:
        """Raise SyncError unless more tokens, at higher precision, show that all is well. A collective."""
        self._num_closer_looks += 1
        more = drawn_completions(
            groups, CLOSER_LOOK * self.check.verify_sequences, seed=(self.seed, module.policy_version)
        )
        look = CloserLook.at(trainer, module, more, temperature=temperature, seed=self.seed)
        found = look.error(module, engine_dtype=self.engine.dtype, tolerance=self.check.logprob_tolerance)
        self._end_together(module, found)
        rank_zero_warn(
            f"version {module.policy_version}: log-probs of engine and policy seemed to differ too much. "
            f"Over more tokens both agree with transformers' own ({look.summary()}), so the run continues. "
            "If this happens often, look at sync/logprob_diff_mean"
        )
