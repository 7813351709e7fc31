"""A module that trains nothing and records its input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule


class Recorder(LightningModule):
    """Record the tasks of each step.

    Each rank draws ``draws[step % len(draws)]`` more in a step, as dynamic sampling does.
    """

    def __init__(self, log: Path, draws: tuple[int, ...] = (0,)) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.log_path = log
        self.draws = draws

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        step = self.global_step
        drawn = self.trainer.datamodule.draw(self.wanted(step))
        optimizer: Any = self.optimizers()
        optimizer.step()
        self.write(
            {
                "step": step,
                "tasks": [task.task_id for task in batch.tasks],
                "drawn": [task.task_id for task in drawn],
            }
        )

    def wanted(self, step: int) -> list[int]:
        return [self.draws[step % len(self.draws)]] * self.trainer.world_size

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.write({"validation": [task.task_id for task in batch.tasks]})

    def write(self, record: dict[str, Any]) -> None:
        with self.log_path.with_name(f"{self.log_path.name}.{self.global_rank}").open("a") as file:
            file.write(json.dumps(record) + "\n")


def read(log: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.with_name(f"{log.name}.{rank}").read_text().splitlines()]
