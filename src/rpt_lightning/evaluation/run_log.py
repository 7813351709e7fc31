"""Read the reward of every step from a run's log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rpt_lightning.records.step_log import read_step_log


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardCurve:
    """The mean reward ``means[i]`` at each step ``steps[i]``, with ascending steps."""

    steps: tuple[int, ...]
    means: tuple[float, ...]

    def first(self, num_steps: int) -> float:
        """Mean over the first ``num_steps`` steps, or over all if there are fewer."""
        return sum(self.means[:num_steps]) / len(self.means[:num_steps])

    def last(self, num_steps: int) -> float:
        return sum(self.means[-num_steps:]) / len(self.means[-num_steps:])


def read_rewards(path: Path) -> RewardCurve:
    """Read the reward curve.

    Raises:
        ValueError: The log is broken (see `read_step_log`), or no line holds a reward.
    """
    means = {
        step: metrics["reward/mean"]
        for step, metrics in read_step_log(path).items()
        if "reward/mean" in metrics
    }
    if not means:
        raise ValueError(f"{path}: no line holds 'reward/mean'. Is it the log of an RPT run?")
    return RewardCurve(steps=tuple(means), means=tuple(means.values()))
