"""Completions with their advantages, as an optimizer step trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rpt_lightning.algo.advantage import AdvantageScale, group_advantages
from rpt_lightning.training.modules.balance import Origin
from rpt_lightning.types import RolloutGroup, TrainSequence


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion to train on, with the log-probs (nats) that the engine drew its tokens with."""

    sequence: TrainSequence
    advantage: float
    rollout_logprobs: tuple[float, ...]
    origin: Origin

    @property
    def is_live(self) -> bool:
        """Whether it has a gradient.

        There is neither a KL nor an entropy term, so a completion with advantage 0 only counts in the
        normalizer.
        """
        return self.advantage != 0.0


def samples_of(group: RolloutGroup, *, scale: AdvantageScale) -> list[Sample]:
    """Return the completions of a group that are trained, with their advantages.

    The baseline is computed only on these, so a masked completion does not move it.
    """
    kept = group.trained
    if len(kept) < 2:  # a single completion cannot be compared with anything
        return []
    rewards = torch.tensor([[reward for _, reward in kept]], dtype=torch.float64)
    advantages = group_advantages(rewards, scale=scale)[0].tolist()
    return [
        Sample(
            sequence=TrainSequence(prompt_ids=group.prompt_ids, target_ids=completion.token_ids),
            advantage=advantage,
            rollout_logprobs=completion.rollout_logprobs,
            origin=origin_of(group),
        )
        for (completion, _), advantage in zip(kept, advantages, strict=True)
    ]


def origin_of(group: RolloutGroup) -> Origin:
    """Return where the sequences of a group come from."""
    return Origin(document=group.task.doc_id, group=group.task.task_id)


def live(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples with a gradient."""
    return [sample for sample in samples if sample.is_live]
