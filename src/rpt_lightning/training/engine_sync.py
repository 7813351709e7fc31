"""The policy's weights into the engine, and the proof that it computes with them."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.policy.weights import named_weights
from rpt_lightning.rollout.rollouter import Rollouter
from rpt_lightning.training.policy_module import PolicyModule
from rpt_lightning.training.sync_check import LogprobDiff, check_logprobs, check_weights, compare_logprobs, logprob_limits, sampled_names
from rpt_lightning.types import RolloutGroup, Task, TrainSequence

# Of a completion that is drawn only to compare its log-probs.
TRIAL_TOKENS = 32


class EngineSync:
    """An engine whose weights are not the policy's is found by the version that it acknowledges, by tensors that are read back from it, and by its
    log-probs; each raises SyncError.

    Args:
        rollouter: Holds the engine.
        seed: Run seed.
        max_model_len: Tokens of prompt and completion together.
        verify_sequences: Completions whose log-probs are compared; 0: none.
        logprob_tolerance: Factor on the limits of the dtypes.
    """

    def __init__(self, rollouter: Rollouter, *, seed: int, max_model_len: int, verify_sequences: int, logprob_tolerance: float) -> None:
        self.rollouter = rollouter
        self.engine = rollouter.engine
        self.seed = seed
        self.max_model_len = max_model_len
        self.verify_sequences = verify_sequences
        self.logprob_tolerance = logprob_tolerance
        self._num_weight_checks = 0

    def sync(self, module: PolicyModule) -> None:
        """Starts the engine where it is not started, and brings it to the policy's version. A collective."""
        if not self.engine.weight_names:
            start = time.perf_counter()
            self.engine.start(module.policy.path, seed=self.seed, max_model_len=self.max_model_len)
            rank_zero_info(f"engine: {self.engine.description}, started in {time.perf_counter() - start:.0f} s")
        with module.clock.phase("sync"):
            if self.engine.version != module.policy_version:
                self.engine.update_weights(named_weights(module.policy), version=module.policy_version)
                # Gathered once more, but only what is compared.
                sampled = named_weights(module.policy, sampled_names(self.engine.weight_names, self._num_weight_checks))
                check_weights(self.engine, sampled, version=module.policy_version, turn=self._num_weight_checks)
                self._num_weight_checks += 1

    def try_out(self, trainer: Trainer, module: PolicyModule, tasks: Sequence[Task]) -> dict[str, float]:
        """As ``check_logprobs``, of the beginnings of completions that are drawn for this only: where those that are trained are of earlier weights."""
        tasks = tasks[: self.verify_sequences]
        completions = self.rollouter.complete(tasks, [0] * len(tasks), 1, max_tokens=min(TRIAL_TOKENS, self.rollouter.max_tokens))
        return self.check_logprobs(trainer, module, self.rollouter.groups(tasks, completions), temperature=self.rollouter.temperature)

    @torch.no_grad()
    def check_logprobs(self, trainer: Trainer, module: PolicyModule, groups: Sequence[RolloutGroup], *, temperature: float) -> dict[str, float]:
        """Compares the engine's log-probs of a few completions of the present weights with the policy's. A collective."""
        if self.verify_sequences == 0:
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
        check_logprobs(difference, self._limits(policy_dtype), version=module.policy_version)
        return {
            "sync/logprob_diff_mean": difference.mean,
            "sync/logprob_diff_p99": difference.p99,
            "sync/logprob_diff_max": difference.max,
        }

    def _limits(self, policy_dtype: torch.dtype) -> LogprobDiff:
        limits, factor = logprob_limits(self.engine.dtype, policy_dtype), self.logprob_tolerance
        return LogprobDiff(mean=limits.mean * factor, p99=limits.p99 * factor, max=limits.max * factor)
