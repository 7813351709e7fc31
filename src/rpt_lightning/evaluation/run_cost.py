"""Cost of training up to a step, summed over a run's log.

training/modules/step_cost.py says what is counted.
"""

from __future__ import annotations

from rpt_lightning.evaluation.run_reader import Run

FLOPS, TOKENS, SECONDS = "cost/flops", "cost/tokens", "cost/time_s"


def total(run: Run, metric: str, *, last_step: int | None = None) -> float | None:
    """Sum a metric over the steps of a run, up to ``last_step``.

    Returns None if no step logged it.

    Raises:
        ValueError: Some of the steps did not log it, so the sum would be too small.
    """
    steps = [metrics for step, metrics in run.steps.items() if last_step is None or step <= last_step]
    values = [metrics[metric] for metrics in steps if metric in metrics]
    if not values:
        return None
    if len(values) < len(steps):
        last_step = max(run.steps) if last_step is None else last_step
        raise ValueError(
            f"{run.name}: only {len(values)} of {len(steps)} steps up to {last_step} logged {metric}, so the "
            "cost of the run is unknown"
        )
    return sum(values)
