"""Counts optimizer steps whose loss or gradient was not finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SkippedSteps:
    """Counts the steps that were skipped. The run stops when ``limit`` are skipped in a row."""

    limit: int
    number: int = 0  # in the whole run
    in_a_row: int = 0
    _last: str = ""

    def count(self, *, loss: Tensor, norm: Tensor) -> bool:
        """Count a step, and return whether it is skipped.

        Args:
            loss: The step's loss, summed over ranks.
            norm: The norm of its gradient over all shards.
        """
        if torch.isfinite(norm) and torch.isfinite(loss):
            self.in_a_row = 0
            return False
        self.number += 1
        self.in_a_row += 1
        self._last = f"loss {loss.item()} and gradient norm {norm.item()}"
        return True

    @property
    def reached_limit(self) -> bool:
        return self.in_a_row >= self.limit

    def error(self, step: int) -> RuntimeError:
        """Return the error with which a run ends at its limit."""
        return RuntimeError(
            f"{self._last} at step {step}: {self.in_a_row} steps in a row were not finite, so the run stops; "
            "they changed no weight. Resume from the last checkpoint with a lower model.optimizer.lr, or "
            "look at the samples of these steps"
        )
