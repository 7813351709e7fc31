"""RPT: GRPO on the groups that the rollout callback puts into the batch (paper, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rpt_lightning.data.modules.batch import TaskBatch
from rpt_lightning.flag_bounds import check_number
from rpt_lightning.policy.model import Policy
from rpt_lightning.pretrained.text_shape import longest_context
from rpt_lightning.pretrained.token_bytes import start_ids
from rpt_lightning.training.modules.balance import Trained, balanced
from rpt_lightning.training.modules.mini_batches import mini_batches_of
from rpt_lightning.training.modules.optimizer_step import optimizer_step
from rpt_lightning.training.modules.policy_gradient import LossSettings, PolicyGradient
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.modules.samples import Sample, live, samples_of
from rpt_lightning.training.modules.trunk import Contexts, ContextSequence, check_rests, context_sequences
from rpt_lightning.types import RolloutGroup


@dataclass(frozen=True, kw_only=True)
class MiniBatch:
    """What this rank trains in one optimizer step. The normalizer is that of all ranks."""

    samples: Sequence[Sample]
    contexts: Contexts
    normalizer: float


class RPTModule(PolicyModule):
    """GRPO on groups of completions.

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
        advantage_scale: "std" divides a group's advantages by its standard deviation (GRPO), "none" does not
            (Dr. GRPO). "rloo" compares each reward with the mean of the others (RLOO), and "maxrl" divides by
            the mean reward, which favours hard tasks (MaxRL; only for rewards of at least 0).
        aggregation: How tokens are combined into one loss. Denominators always count the whole step.
            "token_mean" weights all tokens equally, "sequence_mean" all completions equally, and "constant"
            divides by completions x max_completion_tokens (Dr. GRPO).
        clip_low: The ratio is clipped below 1 - clip_low. This matters only with several optimizer steps
            per batch. Stale rollouts are handled by `correction_cap`.
        clip_high: The ratio is clipped above 1 + clip_high.
        optimizer_steps_per_batch: 1 is exactly on-policy, as in the paper, whose batch is one mini-batch. A
            larger number divides each batch of rollouts into that many mini-batches, which do not depend on
            the number of ranks.
        correction: "truncate" weights each token by min(policy / engine probability, correction_cap), which
            corrects for differences in the engine's computation. "mask" leaves out tokens above the cap. Raw
            and used weights are logged in any case.
        correction_cap: Upper bound of these weights.
        correction_level: "token" uses the ratio of each token. "sequence" uses the geometric mean over the
            whole completion for all of its tokens (as GSPO does). Such means are much closer to 1, so set the
            cap close to 1 as well.
        correction_floor: With "mask", also leave out tokens whose ratio is below this (IcePop: 0.5, with cap
            5). None means no floor.
        truncated: "zero_reward" gives completions that ran into the token limit a reward of 0. "mask" leaves
            them out of the loss and of the baseline. Dynamic sampling and pilots then ignore them too when
            they decide whether a group's rewards differ.
        ntp_weight: Weight of the mean next-token loss (nats per token, temperature 1) that is added to the
            loss. The mean is over the context tokens of the step's tasks. It counts each position of a
            document once and includes zero-variance groups. 0 leaves it out.
        ntp_in_prompt: Train on the context's tokens inside the prompt, after the template's own words. false
            trains on the bare text, which needs an extra forward pass with a chat prompt.
        ntp_whole_documents: Train each document of the step to its end, or to the longest input of the model,
            and not only the text before its last task. The rest needs an extra forward pass.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        micro_batch_tokens: int = 16384,
        gradient_clip: float = 0.2,
        max_skipped_steps: int = 3,
        offload_moments: bool = False,
        advantage_scale: Literal["std", "none", "rloo", "maxrl"] = "std",
        aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        optimizer_steps_per_batch: int = 1,
        correction: Literal["none", "truncate", "mask"] = "none",
        correction_cap: float = 2.0,
        correction_level: Literal["token", "sequence"] = "token",
        correction_floor: float | None = None,
        truncated: Literal["zero_reward", "mask"] = "zero_reward",
        ntp_weight: float = 0.0,
        ntp_in_prompt: bool = False,
        ntp_whole_documents: bool = False,
    ) -> None:
        super().__init__(
            policy,
            optimizer,
            lr_scheduler,
            micro_batch_tokens,
            gradient_clip,
            max_skipped_steps,
            offload_moments,
        )
        if optimizer_steps_per_batch < 1:
            raise ValueError(
                f"model.optimizer_steps_per_batch={optimizer_steps_per_batch}: give 1 (exactly on-policy) or "
                "more"
            )
        if correction_cap < 1.0:
            raise ValueError(
                f"model.correction_cap={correction_cap}: weights are capped at 1 or above; 2 is a usual value"
            )
        if correction_floor is not None and (correction != "mask" or not 0 < correction_floor <= 1):
            raise ValueError(
                f"model.correction_floor={correction_floor}, model.correction={correction}: a floor leaves "
                "out ratios below it, so it is above 0 and at most 1 and needs --model.correction mask; "
                "null is no floor"
            )
        if not 0 <= clip_low <= 1 or clip_high < 0:
            raise ValueError(
                f"model.clip_low={clip_low}, model.clip_high={clip_high}: "
                "ratios are clipped to [1 - clip_low, 1 + clip_high]"
            )
        check_number("model.correction_cap", correction_cap, least=1)
        check_number("model.clip_high", clip_high, least=0)
        check_number("model.ntp_weight", ntp_weight, least=0, below=math.inf, hint="; 0 leaves the term out")
        if ntp_whole_documents and (ntp_in_prompt or ntp_weight == 0):
            raise ValueError(
                f"model.ntp_whole_documents=true with model.ntp_in_prompt={str(ntp_in_prompt).lower()}, "
                f"model.ntp_weight={ntp_weight}: a prompt has no text after its position, and a weight of "
                "0 trains no text; give false, or ntp_in_prompt false and a weight above 0"
            )
        self.advantage_scale = advantage_scale
        self.optimizer_steps_per_batch = optimizer_steps_per_batch
        self.correction = correction
        self.corrects_mismatch = correction != "none"
        self.masks_truncated = truncated == "mask"
        self.ntp_weight = ntp_weight
        self.ntp_in_prompt = ntp_in_prompt
        self.trains_whole_documents = ntp_whole_documents
        self.loss_settings = LossSettings(
            aggregation=aggregation,
            clip_low=clip_low,
            clip_high=clip_high,
            correction=correction,
            correction_cap=correction_cap,
            correction_level=correction_level,
            correction_floor=correction_floor,
            ntp_weight=ntp_weight,
        )

    learns_from_rollouts = True

    def train_batch(self, batch: TaskBatch, batch_idx: int) -> None:
        rollouts = batch.rollouts
        assert rollouts is not None, "the rollout callback puts them in"
        temperature = rollouts.sampling.temperature
        parts = mini_batches_of(rollouts.groups, self.optimizer_steps_per_batch, self.ranks)
        # With one optimizer step per batch the policy has not changed since before the update. The ratio is
        # exactly 1, so there is nothing to compute.
        on_policy = self.optimizer_steps_per_batch == 1
        mini_batches = [self._mini_batch(groups, max_tokens=rollouts.sampling.max_tokens) for groups in parts]
        old_logprobs = [
            None if on_policy else self._logprobs(mini_batch.samples, temperature)
            for mini_batch in mini_batches
        ]
        for mini_batch, old in zip(mini_batches, old_logprobs, strict=True):
            self._optimize(mini_batch, old, temperature)
        trained = [samples for groups in parts for group in groups if (samples := live(self._samples(group)))]
        self.log_step(
            {
                "train/groups": self.ranks.sum(len(trained)),
                "train/completion_tokens": self.ranks.sum(
                    sum(len(sample.sequence.target_ids) for samples in trained for sample in samples)
                ),
            }
        )

    def _samples(self, group: RolloutGroup) -> list[Sample]:
        return samples_of(replace(group, masks_truncated=self.masks_truncated), scale=self.advantage_scale)

    def _contexts(self, groups: Sequence[RolloutGroup]) -> Contexts:
        """What the next-token term trains with these groups. A collective if there is such a term."""
        if self.ntp_weight == 0:
            return Contexts()
        if self.trains_whole_documents:
            check_rests(groups)
        return context_sequences(
            groups,
            start_ids=start_ids(self.tokenizer),
            in_prompt=self.ntp_in_prompt,
            ranks=self.ranks,
            max_tokens=longest_context(self.policy.config),
        )

    def _mini_batch(self, groups: Sequence[RolloutGroup], *, max_tokens: int) -> MiniBatch:
        """Return what this rank trains in one optimizer step, given its groups. A collective."""
        samples = [sample for group in groups for sample in self._samples(group)]
        contexts = self._contexts(groups)
        trained: list[Trained] = [*live(samples), *contexts.sequences]
        share = balanced(trained, self.ranks)
        return MiniBatch(
            samples=[item for item in share if isinstance(item, Sample)],
            contexts=replace(
                contexts, sequences=tuple(item for item in share if isinstance(item, ContextSequence))
            ),
            normalizer=self._normalizer(samples, max_tokens=max_tokens),
        )

    def _optimize(
        self, mini_batch: MiniBatch, old_logprobs: Sequence[Tensor] | None, temperature: float
    ) -> None:
        """Do one optimizer step."""
        gradient = PolicyGradient(
            self.policy,
            mini_batch.samples,
            mini_batch.contexts,
            old_logprobs=old_logprobs,
            temperature=temperature,
            normalizer=mini_batch.normalizer,
            settings=self.loss_settings,
        )
        metrics = optimizer_step(self, gradient.sequences, gradient.loss)
        self.log_step(metrics | gradient.metrics(self.ranks))

    def _normalizer(self, samples: Sequence[Sample], *, max_tokens: int) -> float:
        """The step's global denominator: tokens, completions, or completions x token limit."""
        count = {
            "token_mean": sum(len(sample.sequence.target_ids) for sample in samples),
            "sequence_mean": len(samples),
            "constant": len(samples) * max_tokens,
        }[self.loss_settings.aggregation]
        return max(1.0, float(self.ranks.sum(count)))

    @torch.no_grad()
    def _logprobs(self, samples: Sequence[Sample], temperature: float) -> list[Tensor]:
        """The policy's log-probs of each sample's completion, before any update of this batch."""
        out: list[Tensor] = [torch.empty(0)] * len(samples)
        with self.clock.phase("old_logprobs"):
            for tree, logprobs, _ in self.score_packed(
                [sample.sequence for sample in samples], temperature=temperature
            ):
                rows = tree.unpack(logprobs)
                for row, index in enumerate(tree.sequence_indices):
                    out[index] = rows[row, tree.mask[row]]
        return out
