"""Selects the completions and tokens to compare between engine and policy, and their log-probs from both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.types import Completion, RolloutGroup, TokenIds, TrainSequence


class Sample(NamedTuple):
    """A completion with its prompt."""

    prompt_ids: TokenIds
    completion: Completion

    @property
    def sequence(self) -> TrainSequence:
        return TrainSequence(prompt_ids=self.prompt_ids, target_ids=self.completion.token_ids)


class Scored(NamedTuple):
    """Log-probs of all tokens of some completions, concatenated, in fp64 on the CPU. Both [N]."""

    engine: Tensor
    policy: Tensor


def drawn_completions(groups: Sequence[RolloutGroup], num: int, *, seed: Sequence[int]) -> list[Sample]:
    """Draw at most ``num`` completions from all groups.

    A cache that is stale only for some prompts is found sooner or later. It might never be if only the first
    group were used.
    """
    samples = [Sample(group.prompt_ids, completion) for group in groups for completion in group.completions]
    return [samples[index] for index in sorted(np.random.default_rng(seed).permutation(len(samples))[:num])]


def drawn_tokens(num_tokens: int, num: int, *, seed: Sequence[int]) -> Tensor:
    """Draw at most ``num`` of ``num_tokens`` indices, in ascending order."""
    if num_tokens <= num:
        return torch.arange(num_tokens)
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(num_tokens)[:num]))


def score_samples(
    trainer: Trainer, module: PolicyModule, samples: Sequence[Sample], *, temperature: float
) -> tuple[Scored, torch.dtype]:
    """The log-probs of engine and policy, and the dtype of the policy's. A collective.

    The policy's are computed as in training.
    """
    rows: list[Tensor] = [torch.empty(0)] * len(samples)
    with trainer.precision_plugin.forward_context():
        device = module.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        for tree, logprobs, _ in module.score_packed(
            [sample.sequence for sample in samples], temperature=temperature
        ):
            unpacked = tree.unpack(logprobs).cpu()
            for row, index in enumerate(tree.sequence_indices):
                rows[index] = unpacked[row, : len(samples[index].completion.token_ids)].double()
    engine = [torch.tensor(sample.completion.rollout_logprobs, dtype=torch.float64) for sample in samples]
    return Scored(
        torch.cat([torch.empty(0, dtype=torch.float64), *engine]),
        torch.cat([torch.empty(0, dtype=torch.float64), *rows]),
    ), dtype
