"""RPT: GRPO on the groups that the rollout callback puts into the batch (paper, section 3.2)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from rpt_lightning.algo.advantage import group_advantages
from rpt_lightning.algo.correction import (
    CorrectionStatistics,
    truncated_importance_weights,
)
from rpt_lightning.algo.loss import LossStatistics, policy_loss
from rpt_lightning.data.modules.batch import TaskBatch
from rpt_lightning.data.modules.stream import rank_share
from rpt_lightning.limits import check_number
from rpt_lightning.policy.model import Policy
from rpt_lightning.policy.packing.trees import PackedTree
from rpt_lightning.pretrained.text_shape import longest_context
from rpt_lightning.pretrained.token_bytes import start_ids
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.training.modules.trunk import Contexts, check_rests, context_sequences, mean_loss
from rpt_lightning.types import Completion, RolloutGroup, SamplingSettings, TrainSequence


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """One completion to train on."""

    sequence: TrainSequence
    advantage: float
    rollout_logprobs: tuple[float, ...]


class RPTModule(PolicyModule):
    """GRPO on groups of completions.

    Args:
        policy: The model that is trained.
        optimizer: Optimizer over the policy's parameters, e.g. torch.optim.AdamW.
        lr_scheduler: Learning-rate schedule, advanced once per optimizer step; None keeps the rate constant.
        micro_batch_tokens: Input tokens of one forward and backward pass. Memory and speed depend on it,
            but results do not.
        gradient_clip: Largest global gradient norm (the paper's "actor gradient clip"); 0 turns off clipping.
        max_skipped_steps: A step with a non-finite loss or gradient is skipped; the run stops when this many
            are skipped in a row.
        advantage_scale: "std" divides a group's advantages by its standard deviation (GRPO), "none" does not
            (Dr. GRPO). "rloo" compares each reward with the mean of the others (RLOO), and "maxrl" divides by
            the mean reward, which favours hard tasks (MaxRL; only for rewards of at least 0).
        aggregation: How tokens are combined into one loss, always over the step's global counts. "token_mean"
            weights all tokens equally, "sequence_mean" all completions equally, and "constant" divides by
            completions x max_completion_tokens (Dr. GRPO).
        clip_low: The ratio is clipped below 1 - clip_low. This matters only with several optimizer steps
            per batch. Stale rollouts are handled by `correction_cap`.
        clip_high: The ratio is clipped above 1 + clip_high.
        optimizer_steps_per_batch: 1 is exactly on-policy (the paper's batch = mini-batch). A larger number
            cuts each batch of rollouts into that many mini-batches, which are the same on any number of
            ranks.
        correction: "truncate" weights each token by min(policy / engine probability, correction_cap), which
            corrects for differences in the engine's computation. "mask" leaves out tokens above the cap. Raw
            and used weights are logged in any case.
        correction_cap: Upper bound of those weights.
        correction_level: "token" takes the ratio of each token, "sequence" the geometric mean over the whole
            completion, for all of its tokens (as GSPO does). Means are much closer to 1, so set the cap close
            to 1 as well.
        correction_floor: With "mask", also leave out tokens whose ratio is below this (IcePop: 0.5, with cap
            5). With None there is no floor.
        truncated: "zero_reward" gives completions that ran into the token limit a reward of 0. "mask" leaves
            them out of the loss and of the baseline. Dynamic sampling and pilots then ignore them too when
            they decide whether a group's rewards differ.
        ntp_weight: Weight of the mean next-token loss (nats per token, temperature 1) that is added to the
            loss. The mean is over the context tokens of the step's tasks. It counts each position of a
            document once and includes zero-variance groups. 0 leaves it out.
        ntp_in_prompt: Train on the context's tokens where they stand inside the prompt, after the template's
            own words. false trains on the bare text, which with a chat prompt needs a forward pass of its
            own.
        ntp_whole_documents: Train each document of the step to its end, or to the longest input of the model,
            and not only the text before its last task. The rest needs a forward pass of its own.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        micro_batch_tokens: int = 16384,
        gradient_clip: float = 0.2,
        max_skipped_steps: int = 3,
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
            policy, optimizer, lr_scheduler, micro_batch_tokens, gradient_clip, max_skipped_steps
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
                f"model.ntp_weight={ntp_weight}: a prompt holds no text behind its position, and a weight of "
                "0 trains no text; give false, or ntp_in_prompt false and a weight above 0"
            )
        self.advantage_scale = advantage_scale
        self.aggregation = aggregation
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.optimizer_steps_per_batch = optimizer_steps_per_batch
        self.correction = correction
        self.corrects_mismatch = correction != "none"
        self.correction_cap = correction_cap
        self.correction_level = correction_level
        self.correction_floor = correction_floor
        self.masks_truncated = truncated == "mask"
        self.ntp_weight = ntp_weight
        self.ntp_in_prompt = ntp_in_prompt
        self.trains_whole_documents = ntp_whole_documents

    learns_from_rollouts = True

    def training_step(self, batch: TaskBatch, batch_idx: int) -> None:
        rollouts = batch.rollouts
        assert rollouts is not None, "the rollout callback puts them in"
        temperature = rollouts.sampling.temperature
        parts = mini_batches_of(rollouts.groups, self.optimizer_steps_per_batch, self.ranks)
        cut = [[self._samples(group) for group in groups] for groups in parts]
        mini_batches = [list(itertools.chain.from_iterable(groups)) for groups in cut]
        # With one optimizer step a batch the policy has not changed since before the update. The ratio is
        # exactly 1, so there is nothing to compute.
        on_policy = self.optimizer_steps_per_batch == 1
        old_logprobs = [
            None if on_policy else self._logprobs(_live(samples), temperature) for samples in mini_batches
        ]
        for groups, samples, old in zip(parts, mini_batches, old_logprobs, strict=True):
            self._optimize(samples, old, rollouts.sampling, self._contexts(groups))
        trained = [_live(samples) for groups in cut for samples in groups]
        self.log_step(
            {
                "train/groups": self.ranks.sum(sum(map(bool, trained))),
                "train/completion_tokens": self.ranks.sum(
                    sum(len(sample.sequence.target_ids) for samples in trained for sample in samples)
                ),
            }
        )

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

    def _optimize(
        self,
        samples: Sequence[_Sample],
        old_logprobs: list[Tensor] | None,
        sampling: SamplingSettings,
        contexts: Contexts,
    ) -> None:
        """One optimizer step."""
        normalizer = self._normalizer(samples, max_tokens=sampling.max_tokens)
        live = _live(samples)
        loss_parts: list[LossStatistics] = []
        correction_parts: list[CorrectionStatistics] = []
        entropies: list[Tensor] = []
        ntp_parts: list[Tensor] = []

        def micro_batch_loss(tree: PackedTree) -> Tensor:
            token_logprobs, token_entropy = self.policy(tree, temperature=sampling.temperature)
            ntp_loss, tree = contexts.loss(tree, token_logprobs, first=len(live))
            ntp_parts.append(ntp_loss.detach())
            if not tree.sequence_indices:  # it holds contexts only
                return self.ntp_weight * ntp_loss
            logprobs = tree.unpack(token_logprobs)  # [S, T]
            rows = [live[index] for index in tree.sequence_indices]
            old = (
                logprobs.detach()
                if old_logprobs is None
                else _padded([old_logprobs[index] for index in tree.sequence_indices], like=logprobs)
            )
            rollout_logprobs = _padded([row.rollout_logprobs for row in rows], like=logprobs)
            mode = "truncate" if self.correction == "none" else self.correction
            weights, correction_part = truncated_importance_weights(
                old,
                rollout_logprobs,
                tree.mask,
                cap=self.correction_cap,
                mode=mode,
                level=self.correction_level,
                floor=self.correction_floor,
            )
            correction_parts.append(correction_part)
            loss, loss_part = policy_loss(
                logprobs,
                old,
                torch.tensor([row.advantage for row in rows], dtype=logprobs.dtype, device=logprobs.device),
                tree.mask,
                clip_low=self.clip_low,
                clip_high=self.clip_high,
                aggregation=self.aggregation,
                normalizer=normalizer,
                correction=weights if self.corrects_mismatch else None,
            )
            loss_parts.append(loss_part)
            entropies.append(tree.unpack(token_entropy.detach())[tree.mask])
            return loss + self.ntp_weight * ntp_loss

        metrics: dict[str, Tensor | float] = {}
        sequences = [sample.sequence for sample in live]
        metrics |= self.optimizer_step_over([*sequences, *contexts.sequences], micro_batch_loss)
        if self.ntp_weight > 0:
            metrics |= {
                "loss/ntp": mean_loss(ntp_parts, self.ranks),
                "train/ntp_tokens": float(contexts.num_targets),
            }
        of_ranks = self.ranks.gather(
            (LossStatistics.combined(loss_parts), CorrectionStatistics.combined(correction_parts))
        )
        metrics |= LossStatistics.combined(loss for loss, _ in of_ranks).metrics()
        metrics |= CorrectionStatistics.combined(correction for _, correction in of_ranks).metrics()
        entropy_sum = self.ranks.sum(sum((part.double().sum() for part in entropies), torch.zeros(())))
        num_tokens = self.ranks.sum(sum(part.numel() for part in entropies))
        metrics |= {
            "policy/entropy": entropy_sum / num_tokens.clamp(min=1),
            "train/live_completions": self.ranks.sum(len(live)),
        }
        self.log_step(metrics)

    def _samples(self, group: RolloutGroup) -> list[_Sample]:
        """Completions with their advantages.

        The baseline is computed only on completions that are trained, so a masked one does not move it.
        """
        kept = replace(group, masks_truncated=self.masks_truncated).trained
        if len(kept) < 2:  # a single completion cannot be compared with anything
            return []
        rewards = torch.tensor([[reward for _, reward in kept]], dtype=torch.float64)
        advantages = group_advantages(rewards, scale=self.advantage_scale)[0].tolist()
        return [
            _sample(group, completion, advantage)
            for (completion, _), advantage in zip(kept, advantages, strict=True)
        ]

    def _normalizer(self, samples: Sequence[_Sample], *, max_tokens: int) -> float:
        """The step's global denominator: tokens, completions, or completions x token limit."""
        count = {
            "token_mean": sum(len(sample.sequence.target_ids) for sample in samples),
            "sequence_mean": len(samples),
            "constant": len(samples) * max_tokens,
        }[self.aggregation]
        return max(1.0, float(self.ranks.sum(count)))

    @torch.no_grad()
    def _logprobs(self, samples: Sequence[_Sample], temperature: float) -> list[Tensor]:
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


def _live(samples: Sequence[_Sample]) -> list[_Sample]:
    """The samples with a gradient.

    There is neither a KL nor an entropy term, so a completion with advantage 0 only counts in the normalizer.
    """
    return [sample for sample in samples if sample.advantage != 0.0]


def mini_batches_of(
    groups: Sequence[RolloutGroup], number: int, ranks: Ranks
) -> list[Sequence[RolloutGroup]]:
    """This rank's share of each of ``number`` mini-batches, given its groups. A collective if ``number`` > 1.

    Mini-batches are contiguous parts, of nearly equal size, of the concatenated groups of all ranks. So the
    number of ranks does not change which group is in which mini-batch. Each mini-batch is then divided among
    the ranks again. Otherwise a few ranks would do all the work of a mini-batch while the others wait.
    """
    if number == 1:
        return [groups]
    step = [group for part in ranks.gather(groups) for group in part]
    bounds = [round(i * len(step) / number) for i in range(number + 1)]
    return [
        rank_share(step[start:end], rank=ranks.data_rank, num_ranks=ranks.num_data)
        for start, end in itertools.pairwise(bounds)
    ]


def _sample(group: RolloutGroup, completion: Completion, advantage: float) -> _Sample:
    sequence = TrainSequence(prompt_ids=group.prompt_ids, target_ids=completion.token_ids)
    return _Sample(sequence=sequence, advantage=advantage, rollout_logprobs=completion.rollout_logprobs)


def _padded(rows: Sequence[Sequence[float] | Tensor], *, like: Tensor) -> Tensor:
    """Rows of numbers, padded with 0 to the shape, dtype and device of ``like`` [S, T]."""
    out = torch.zeros_like(like, requires_grad=False)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.as_tensor(row, dtype=like.dtype, device=like.device)
    return out
