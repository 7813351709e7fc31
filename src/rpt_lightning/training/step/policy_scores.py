"""The policy's own log-probs, for objectives whose rewards depend on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer

from rpt_lightning.rollout.rollouter import Score
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.types import TrainSequence


def scores_of_policy(trainer: Trainer, module: PolicyModule) -> Score:
    """Return a function that scores sequences with the module's policy, in the run's precision.

    It returns the log-probs (nats, temperature 1) of each sequence's target tokens. A collective.
    """

    @torch.no_grad()
    def score(sequences: Sequence[TrainSequence]) -> list[tuple[float, ...]]:
        scores: list[tuple[float, ...]] = [()] * len(sequences)
        with trainer.precision_plugin.forward_context():
            for tree, logprobs, _ in module.score_packed(sequences):
                for row, index in enumerate(tree.sequence_indices):
                    scores[index] = tuple(logprobs[tree.rows[row][tree.mask[row]]].tolist())
        return scores

    return score
