"""How likely and how right the policy's answers are without a thought."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from rpt_lightning.data.modules.batch import HeldOutBatch
from rpt_lightning.objectives.base import BoundObjective
from rpt_lightning.policy.packing.trees import PackedTree
from rpt_lightning.records.results import PositionResult
from rpt_lightning.training.validation.position_records import position_result
from rpt_lightning.types import TrainSequence


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectScore:
    """The policy's answer without a thought.

    ``logprob`` (nats) is that of the true answer. ``is_right`` says whether each of its tokens is the most
    likely one after those before it.
    """

    logprob: float
    is_right: bool


def direct_scores(
    sequences: Sequence[TrainSequence], scored: Iterable[tuple[PackedTree, Tensor, Tensor]]
) -> list[DirectScore]:
    """Return the score of each sequence's targets.

    Args:
        sequences: The true answers, each after its prompt.
        scored: Their trees, with log-probs and the most likely ids of the scored tokens, both ``[M]``.
    """
    scores = [DirectScore(logprob=0.0, is_right=False)] * len(sequences)
    for tree, logprobs, likely in scored:
        # Several documents may share a context and differ in what follows. Each row is one sequence.
        for row, index in enumerate(tree.sequence_indices):
            places = tree.rows[row][tree.mask[row]]
            scores[index] = DirectScore(
                logprob=logprobs[places].sum().item(),
                is_right=tuple(likely[places].tolist()) == sequences[index].target_ids,
            )
    return scores


def position_results(
    batch: HeldOutBatch,
    objective: BoundObjective,
    sequences: Sequence[TrainSequence],
    scores: Sequence[DirectScore],
) -> list[PositionResult]:
    """Return the records of held-out positions from their direct scores and, if any, their answers."""
    return [
        position_result(
            task,
            objective,
            ntp_correct=score.is_right,
            ntp_logprob=score.logprob,
            context_tokens=len(sequence.prompt_ids),
            answer=None if batch.answers is None else batch.answers[i],
        )
        for i, (task, sequence, score) in enumerate(zip(batch.tasks, sequences, scores, strict=True))
    ]
