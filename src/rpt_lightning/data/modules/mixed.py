"""Reasoning traces and plain text in every step.

This is the supervised mixture that RPT is compared with, on the same corpus.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from rpt_lightning.data.modules.base import ContextLimit, EvalLoader, StepLoader
from rpt_lightning.data.modules.batch import SequenceBatch
from rpt_lightning.data.modules.text import TextDataModule
from rpt_lightning.data.modules.traces import TraceDataModule
from rpt_lightning.objectives.base import Objective


class MixedDataModule(LightningDataModule):
    """Serve reasoning traces and plain text together.

    Training batches are `SequenceBatch`es that hold a step of both parts. Every target token has the same
    weight in the loss.

    Args:
        traces: The reasoning traces. Their data module sets how many there are in a step. Its held-out
            positions are used for validation.
        text: Whole documents of the same task folder. Their data module sets how many there are in a step.
    """

    makes = "sequences"

    def __init__(self, traces: TraceDataModule, text: TextDataModule) -> None:
        super().__init__()
        if traces.task_dir != text.task_dir:
            raise ValueError(
                f"--data.traces.task_dir {traces.task_dir}, --data.text.task_dir {text.task_dir}: "
                "a mixture is of one corpus, so give one"
            )
        self.traces = traces
        self.text = text

    def setup(self, stage: str) -> None:
        """Open and check the task folder.

        Raises ValueError if the model being trained has a different tokenizer.
        """
        for part in (self.traces, self.text):
            part.trainer = self.trainer
            part.setup(stage)

    def use_objective(self, objective: Objective) -> None:
        self.traces.use_objective(objective)

    def context_limit(self, split: Literal["train", "heldout"]) -> ContextLimit:
        return self.traces.context_limit(split)

    def train_dataloader(self) -> StepLoader:
        loaders = [self.traces.train_dataloader(), self.text.train_dataloader()]
        return StepLoader(
            lambda: SequenceBatch(
                sequences=tuple(sequence for loader in loaders for sequence in loader.next_batch().sequences)
            ),
            num_steps=min(loader.num_steps for loader in loaders),
        )

    def val_dataloader(self) -> EvalLoader:
        return self.traces.val_dataloader()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch as it is: records hold no tensors."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"traces": self.traces.state_dict(), "text": self.text.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.traces.load_state_dict(state_dict["traces"])
        self.text.load_state_dict(state_dict["text"])
