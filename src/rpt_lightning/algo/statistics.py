"""Statistics of the parts of a step (micro-batches, ranks), which combine exactly to those of the step."""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Self

from torch import Tensor

# A part's own numbers are 0-d fp64 tensors, so that counting them does not wait for the device.
Number = Tensor | float


@dataclass(frozen=True, kw_only=True)
class Statistics(ABC):
    """Statistics over the tokens of one part. Their defaults are those of a part without tokens."""

    num_tokens: Number = 0.0

    @abstractmethod
    def __add__(self, other: Self) -> Self:
        """Return the statistics of both parts together. The parts have no token in common."""

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Return what is logged. Each number is 0 if there are no tokens."""

    @classmethod
    def combined(cls, parts: Iterable[Self]) -> Self:
        """Return the statistics of all parts together, as floats, which can be sent to other ranks."""
        on_host = [
            replace(part, **{field.name: float(getattr(part, field.name)) for field in fields(part)})
            for part in parts
        ]
        # A part without tokens adds nothing, and its maximum of 0 would hide a NaN of the next part.
        counted = [part for part in on_host if part.num_tokens]
        return functools.reduce(operator.add, counted) if counted else cls()

    def per_token(self, total: Number) -> float:
        """Divide a sum over the tokens by their number."""
        return float(total) / max(1.0, float(self.num_tokens))


def larger(left: Number, right: Number) -> Number:
    """Return the larger of two numbers. If they cannot be compared (NaN), return ``left``."""
    return right if right > left else left
