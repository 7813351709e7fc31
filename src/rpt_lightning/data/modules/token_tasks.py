"""Tasks for next-token reasoning."""

from __future__ import annotations

from collections.abc import Sequence

from rpt_lightning.data.modules.base import TaskFolderDataModule
from rpt_lightning.data.modules.batch import TaskBatch
from rpt_lightning.data.modules.stream import Order, ShuffledOrder
from rpt_lightning.data.modules.tiers import TieredOrder, Tiers
from rpt_lightning.types import TokenTask


class TokenTaskDataModule(TaskFolderDataModule):
    """Serve next-token reasoning tasks. Training batches are `TaskBatch`es.

    Args:
        task_dir: Folder made by ``rpt prepare``.
        tasks_per_step: Tasks in one step, over all ranks.
        positions_per_document: Number of positions of a document to train on together, if it has that many.
            They share their prefix.
        max_context_tokens: Truncate longer contexts on the left.
        num_eval_tasks: Number of held-out positions in a validation.
        eval_min_entropy: Validate only on positions whose proxy entropy exceeds this, in nats.
        eval_batch_size: Tasks in one validation batch, over all ranks. Only the results after shuffled
            thoughts depend on it.
        seed: Seed of the order and of the choice of held-out positions.
        tiers: Order of the tasks from easy to hard, by their entropy. It reads the whole folder once at the
            start.
    """

    makes = "tasks"

    def __init__(
        self,
        task_dir: str,
        tasks_per_step: int = 256,
        positions_per_document: int = 1,
        max_context_tokens: int | None = None,
        num_eval_tasks: int = 1024,
        eval_min_entropy: float = 0.5,
        eval_batch_size: int = 256,
        seed: int = 0,
        tiers: Tiers = Tiers(),
    ) -> None:
        super().__init__(
            task_dir,
            items_per_step=tasks_per_step,
            flag="tasks_per_step",
            max_context_tokens=max_context_tokens,
            num_eval_tasks=num_eval_tasks,
            eval_min_entropy=eval_min_entropy,
            eval_batch_size=eval_batch_size,
            seed=seed,
        )
        if positions_per_document < 1:
            raise ValueError(f"--data.positions_per_document {positions_per_document}: must be at least 1")
        self.positions_per_document = positions_per_document
        self.tiers = tiers

    def make_order(self) -> Order:
        if self.tiers.are_set:
            return TieredOrder(
                [self.train.document(index)["entropy"] for index in range(len(self.train))],
                self.train.chunk_sizes,
                self.tiers,
                bundle_size=self.positions_per_document,
                seed=self.seed,
                items_per_step=self.items_per_step,
                where=f"{self.task_dir}, train",
            )
        return ShuffledOrder(
            self.train.num_positions,
            self.train.chunk_sizes,
            bundle_size=self.positions_per_document,
            seed=self.seed,
        )

    def make_batch(self, items: list[tuple[int, int]]) -> TaskBatch:
        return TaskBatch(tasks=tuple(self.train.task(document, k) for document, k in items))

    def draw(self, wanted: Sequence[int]) -> tuple[TokenTask, ...]:
        """Draw further tasks for this rank (see ``draw_items``)."""
        return tuple(self.train.task(document, k) for document, k in self.draw_items(wanted))
