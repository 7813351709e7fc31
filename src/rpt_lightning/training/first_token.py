"""The policy's own probability of each prediction's first token, which the dense rewards use.

See the paper, section 3.2, alternative rewards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer

from rpt_lightning.rollout.rollouter import FirstTokenProbs
from rpt_lightning.tasks.token_bytes import TokenBytes, start_ids
from rpt_lightning.training.policy_module import PolicyModule
from rpt_lightning.types import Task, TrainSequence


def probs_of_policy(trainer: Trainer, module: PolicyModule) -> FirstTokenProbs:
    """``first_token_probs`` of the module's policy, in the run's precision."""
    token_bytes = TokenBytes(module.tokenizer)

    def probs(tasks: Sequence[Task], predictions: Sequence[Sequence[bytes | None]]) -> list[list[float]]:
        with trainer.precision_plugin.forward_context():
            return first_token_probs(module, token_bytes, tasks, predictions)

    return probs


@torch.no_grad()
def first_token_probs(
    module: PolicyModule,
    token_bytes: TokenBytes,
    tasks: Sequence[Task],
    predictions: Sequence[Sequence[bytes | None]],
) -> list[list[float]]:
    """P(y_0 | x_<t) without reasoning, at temperature 1, for each prediction of each task's group.

    y_0 is the first token that the tokenizer makes of the prediction. The probability is 0 if there is no
    prediction or if it is not text.
    """
    start = start_ids(module.tokenizer)
    probs = [[0.0] * len(group) for group in predictions]
    places: list[tuple[int, int]] = []
    sequences: list[TrainSequence] = []
    for i, (task, group) in enumerate(zip(tasks, predictions, strict=True)):
        for j, prediction in enumerate(group):
            if first := _first_ids(token_bytes, prediction):
                places.append((i, j))
                sequences.append(TrainSequence(prompt_ids=start + task.context_ids, target_ids=first))
    for tree, logprobs, _ in module.score_packed(sequences):
        for row, index in enumerate(tree.sequence_indices):
            i, j = places[index]
            probs[i][j] = logprobs[tree.rows[row, 0]].exp().item()
    return probs


def _first_ids(token_bytes: TokenBytes, prediction: bytes | None) -> tuple[int, ...]:
    try:
        return token_bytes.encode_plain((prediction or b"").decode())[:1]
    except ValueError:  # not UTF-8, or the tokenizer has no token for a character
        return ()
