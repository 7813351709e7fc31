"""Standard next-token training of the policy.

It serves for the cold start on reasoning traces and as the continual-pre-training baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rpt_lightning.data.modules.batch import SequenceBatch
from rpt_lightning.policy.packing.trees import PackedTree
from rpt_lightning.training.distributed.ranks import Ranks
from rpt_lightning.training.modules.balance import Origin, balanced
from rpt_lightning.training.modules.optimizer_step import optimizer_step
from rpt_lightning.training.modules.policy_module import PolicyModule
from rpt_lightning.types import TrainSequence


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """A sequence of one rank. No other sequence is known to share its beginning."""

    sequence: TrainSequence
    origin: Origin


class NTPModule(PolicyModule):
    """Trains on the mean negative log-likelihood of the target tokens of each step's sequences.

    The mean is over the step's global number of target tokens. Ranks share the sequences by tokens.
    """

    def train_batch(self, batch: SequenceBatch, batch_idx: int) -> None:
        sequences = list(batch.sequences)
        num_targets = float(self.ranks.sum(sum(len(sequence.target_ids) for sequence in sequences)))

        def micro_batch_loss(tree: PackedTree) -> Tensor:
            logprobs, _ = self.policy(tree)
            return -tree.unpack(logprobs).sum() / num_targets

        metrics = optimizer_step(self, shared_by_tokens(sequences, self.ranks), micro_batch_loss)
        self.log_step(metrics | {"train/target_tokens": num_targets})


def shared_by_tokens(sequences: Sequence[TrainSequence], ranks: Ranks) -> list[TrainSequence]:
    """Return the sequences that this rank trains, given those that it was dealt. A collective."""
    names = [f"rank {ranks.data_rank}, sequence {index}" for index in range(len(sequences))]
    texts = [
        _Text(sequence=sequence, origin=Origin(document=name, group=name))
        for sequence, name in zip(sequences, names, strict=True)
    ]
    return [text.sequence for text in balanced(texts, ranks)]
