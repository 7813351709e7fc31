"""Checks the precision that a run trains in."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info

from rpt_lightning.policy.adapter import Adapter
from rpt_lightning.training.cpu_precision import bf16_is_slow

PRECISIONS = ("32-true", "bf16-mixed")


def check_precision(
    precision: str, *, on_cpu: bool, gathers_bf16: bool, adapter: Adapter | None = None
) -> None:
    """Raise ValueError for a precision that training cannot use. Report one that is slow on this CPU.

    Args:
        precision: The trainer's precision.
        on_cpu: Whether the run computes on a CPU.
        gathers_bf16: Whether the strategy gathers layers in bf16.
        adapter: The adapter that is trained, if there is one.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"--trainer.precision {precision}: give one of {', '.join(PRECISIONS)}. Master "
            "weights stay in fp32, since a 16-bit weight does not move at RPT's learning rate. Under "
            "16-mixed, gradients would be clipped while they are still scaled with the loss"
        )
    if precision == "bf16-mixed" and on_cpu and bf16_is_slow():
        rank_zero_info(
            "precision: this CPU has no instructions for bf16; --trainer.precision 32-true "
            "(and --rollout.engine.dtype float32) is several times faster"
        )
    if adapter is not None and adapter.base_dtype == "bfloat16" and precision != "bf16-mixed":
        raise ValueError(
            f"model.policy.adapter.base_dtype is bfloat16, but --trainer.precision is {precision}; give "
            "bf16-mixed, or --model.policy.adapter.base_dtype float32"
        )
    if gathers_bf16 and precision != "bf16-mixed":
        raise ValueError(
            "trainer.strategy.gather_bf16 computes in bf16, but --trainer.precision is "
            f"{precision}; give bf16-mixed"
        )
