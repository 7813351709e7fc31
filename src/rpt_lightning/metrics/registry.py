"""Every metric that a run logs, in the order of docs/metrics.md.

`scripts/metrics_page.py` writes the tables of that page from here, and `over_ranks` looks up how to reduce a
metric. Each section is a file in `registered/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rpt_lightning.metrics.metric import Metric
from rpt_lightning.metrics.registered import (
    engine_and_policy,
    machine,
    optimization,
    rollouts,
    step_time,
    validation,
)

SECTIONS = (
    rollouts.SECTION,
    engine_and_policy.SECTION,
    optimization.SECTION,
    step_time.SECTION,
    machine.SECTION,
    validation.SECTION,
)

_METRICS = [metric for section in SECTIONS for row in section.rows for metric in row.metrics]
METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _METRICS})
"""All metrics by name."""
assert len(METRICS) == len(_METRICS), "a metric is registered twice"


def registered(name: str) -> Metric:
    """Return the metric of this name.

    >>> registered("rollout/tokens").reduction.value
    'sum'

    Raises:
        ValueError: No metric of this name is registered.
    """
    if name not in METRICS:
        raise ValueError(
            f"{name}: no such metric is registered. Add a row for it to a file in metrics/registered/, which "
            "says what it means and how the values of several ranks become one"
        )
    return METRICS[name]
