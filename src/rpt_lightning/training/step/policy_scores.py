"""The policy's own log-probs, for rewards that depend on them and for the selection of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.rollout.rollouter import Score
from rpt_lightning.rollout.selection import Chance, ScoreTasks
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.types import Task, TrainSequence


def scores_of_policy(trainer: Trainer, module: PolicyModule) -> Score:
    """Return a function that scores sequences with the module's policy, in the run's precision.

    It returns the log-probs (nats, temperature 1) of each sequence's target tokens. A collective.
    """

    def score(sequences: Sequence[TrainSequence]) -> list[tuple[float, ...]]:
        scores: list[tuple[float, ...]] = [()] * len(sequences)
        for index, logprobs, _ in _scored(trainer, module, sequences):
            scores[index] = tuple(logprobs.tolist())
        return scores

    return score


def chances_of_policy(trainer: Trainer, module: PolicyModule, objective: BoundObjective) -> ScoreTasks:
    """Return a function that scores the truth of tasks without a thought, as a validation does.

    Tasks come as they are put to the policy (`StepRoller.pose`). All tensor-parallel ranks get what the first
    of them computed, so that they select the same tasks.
    """

    def score(tasks: Sequence[Task]) -> list[Chance]:
        chances = [Chance(logprob=0.0, entropy=0.0)] * len(tasks)
        sequences = [objective.direct_sequence(task) for task in tasks]
        for index, logprobs, entropy in _scored(trainer, module, sequences):
            chances[index] = Chance(logprob=logprobs.sum().item(), entropy=entropy[0].item())
        return module.ranks.gather_parts(chances)[0]

    return score


def _scored(
    trainer: Trainer, module: PolicyModule, sequences: Sequence[TrainSequence]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each sequence's index, and log-probs and entropies (nats) of its targets, ``[T]``."""
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        for tree, logprobs, entropy in module.score_packed(sequences):
            logprobs, entropy, rows, mask = (t.cpu() for t in (logprobs, entropy, tree.rows, tree.mask))
            for row, index in enumerate(tree.sequence_indices):
                places = rows[row][mask[row]]
                yield index, logprobs[places], entropy[places]
