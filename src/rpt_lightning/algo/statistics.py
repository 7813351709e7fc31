"""Statistics of the parts of a step (micro-batches, ranks), which combine exactly to those of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


def add_up(parts: Sequence[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """Sum the entries named ``sum_...`` and take the maximum of those named ``max_...``.

    The result is empty if there are no parts.

    >>> add_up([{"sum_tokens": 2.0, "max_ratio": 1.5}, {"sum_tokens": 3.0, "max_ratio": 1.0}])
    {'sum_tokens': 5.0, 'max_ratio': 1.5}
    """
    names = parts[0] if parts else ()
    return {
        name: float((max if name.startswith("max_") else sum)(part[name] for part in parts)) for name in names
    }
