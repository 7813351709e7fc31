"""Standard next-token training of the policy.

It serves for the cold start on reasoning traces and as the continual-pre-training baseline.
"""

from __future__ import annotations

from torch import Tensor

from rpt_lightning.data.modules.batch import SequenceBatch
from rpt_lightning.policy.packing.trees import PackedTree
from rpt_lightning.training.modules.optimizer_step import optimizer_step
from rpt_lightning.training.modules.policy_module import PolicyModule


class NTPModule(PolicyModule):
    """Trains on the mean negative log-likelihood of the target tokens of each step's sequences.

    The mean is over the step's global number of target tokens.
    """

    def train_batch(self, batch: SequenceBatch, batch_idx: int) -> None:
        sequences = list(batch.sequences)
        num_targets = float(self.ranks.sum(sum(len(sequence.target_ids) for sequence in sequences)))

        def micro_batch_loss(tree: PackedTree) -> Tensor:
            logprobs, _ = self.policy(tree)
            return -tree.unpack(logprobs).sum() / num_targets

        metrics = optimizer_step(self, sequences, micro_batch_loss)
        self.log_step(metrics | {"train/target_tokens": num_targets})
