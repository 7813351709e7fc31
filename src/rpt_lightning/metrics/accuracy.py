"""Next-token accuracy by difficulty (RPT, section 4.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from rpt_lightning.metrics.difficulty_bands import BANDS
from rpt_lightning.metrics.interval import wilson_interval


class NextTokenAccuracy(Metric):
    """Accuracy at held-out positions, over all of them and for each band of the proxy's entropy.

    States are counts, so the results of ranks and batches add up. If a sampler repeats positions to fill the
    last batch, leave the repeats out before updating.
    """

    full_state_update = False
    num_positions: Tensor
    num_correct: Tensor
    num_answerable: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("num_positions", "num_correct", "num_answerable"):
            self.add_state(name, default=torch.zeros(1 + len(BANDS), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, correct: Tensor, entropy: Tensor, answerable: Tensor) -> None:
        """Add positions.

        ``correct`` and ``answerable`` are booleans and ``entropy`` is the proxy's, in nats. All are [N].
        """
        assert correct.shape == entropy.shape == answerable.shape
        thresholds = torch.tensor([-torch.inf, *BANDS.values()], device=entropy.device, dtype=torch.float64)
        in_band = entropy.double()[:, None] > thresholds  # [N, 1 + bands]
        self.num_positions += in_band.sum(dim=0).to(self.num_positions.device)
        self.num_correct += (in_band & correct.bool()[:, None]).sum(dim=0).to(self.num_correct.device)
        self.num_answerable += (
            (in_band & answerable.bool()[:, None]).sum(dim=0).to(self.num_answerable.device)
        )

    def compute(self) -> dict[str, float]:
        """Compute the results for each of ``all``, ``easy``, ``medium`` and ``hard``.

        They are ``<band>/accuracy``, its 95 % interval ``_low`` and ``_high``, the counts and the ceiling.
        The ceiling is the share of positions that have a rewardable answer. No policy can answer the others
        through the box. Without positions, the accuracy and the ceiling are NaN.
        """
        result: dict[str, float] = {}
        for i, band in enumerate(("all", *BANDS)):
            n, correct, answerable = (
                int(state[i]) for state in (self.num_positions, self.num_correct, self.num_answerable)
            )
            low, high = wilson_interval(correct, n)
            result |= {
                f"{band}/accuracy": correct / n if n else float("nan"),
                f"{band}/accuracy_low": low,
                f"{band}/accuracy_high": high,
                f"{band}/num_positions": float(n),
                f"{band}/num_answerable": float(answerable),
                f"{band}/ceiling": answerable / n if n else float("nan"),
            }
        return result
