"""Continual next-token training on the same documents, the baseline that RPT is compared with."""

from __future__ import annotations

import numpy as np

from rpt_lightning.data.modules.base import TaskFolderDataModule
from rpt_lightning.data.modules.batch import SequenceBatch
from rpt_lightning.data.modules.stream import ShuffledOrder
from rpt_lightning.pretrained.token_bytes import start_ids
from rpt_lightning.types import TrainSequence


class TextDataModule(TaskFolderDataModule):
    """Serve whole documents for next-token training.

    Training batches are `SequenceBatch`es. Documents begin with whatever tokens the tokenizer
    puts at the start of a text. Every token except the first is a target.

    Args:
        task_dir: Folder made by ``rpt prepare``.
        documents_per_step: Documents in one step, over all ranks.
        max_tokens: Truncate longer documents to this many tokens, including the begin-of-text token. None
            truncates to the longest input that the model supports.
        max_context_tokens: In a validation, truncate longer contexts on the left.
        num_eval_tasks: Number of held-out positions in a validation.
        eval_min_entropy: Validate only on positions whose proxy entropy exceeds this, in nats.
        eval_batch_size: Tasks in one validation batch, over all ranks. Only the results after shuffled
            thoughts depend on it.
        seed: Seed of the order and of the choice of held-out positions.
    """

    def __init__(
        self,
        task_dir: str,
        documents_per_step: int = 16,
        max_tokens: int | None = None,
        max_context_tokens: int | None = None,
        num_eval_tasks: int = 1024,
        eval_min_entropy: float = 0.5,
        eval_batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(
            task_dir,
            items_per_step=documents_per_step,
            flag="documents_per_step",
            max_context_tokens=max_context_tokens,
            num_eval_tasks=num_eval_tasks,
            eval_min_entropy=eval_min_entropy,
            eval_batch_size=eval_batch_size,
            seed=seed,
        )
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(
                f"--data.max_tokens {max_tokens}: must be at least 2, since the first token is not a target"
            )
        self.max_tokens = max_tokens

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.start_ids = start_ids(self.train.tokenizer)

    def make_order(self) -> ShuffledOrder:
        return ShuffledOrder(
            np.ones(len(self.train), np.int32), self.train.chunk_sizes, bundle_size=1, seed=self.seed
        )

    def make_batch(self, items: list[tuple[int, int]]) -> SequenceBatch:
        limit = self.max_tokens or self._num_positions()
        token_ids = [(self.start_ids + self.train.token_ids(document))[:limit] for document, _ in items]
        return SequenceBatch(
            sequences=tuple(TrainSequence(prompt_ids=ids[:1], target_ids=ids[1:]) for ids in token_ids)
        )
