"""The reward of every step, read back from a run's log file (JSONL, one object an optimizer step, with at least ``step`` and ``reward/mean``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardCurve:
    """``means[i]`` is the mean reward of step ``steps[i]``; steps ascend."""

    steps: tuple[int, ...]
    means: tuple[float, ...]

    def first(self, num_steps: int) -> float:
        """Mean over the first ``num_steps`` steps, or over all where there are fewer."""
        return sum(self.means[:num_steps]) / len(self.means[:num_steps])

    def last(self, num_steps: int) -> float:
        return sum(self.means[-num_steps:]) / len(self.means[-num_steps:])


def read_rewards(path: Path) -> RewardCurve:
    """Read the reward curve. A step that was logged twice (a run that stopped and resumed) counts as it was logged last.

    Raises:
        ValueError: the file is missing, a line is not JSON, or no line holds a reward.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such run log. It is written by `rpt fit` into the run's folder.")
    means: dict[int, float] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: not JSON ({error}).") from error
        if "reward/mean" in entry:
            means[entry["step"]] = entry["reward/mean"]
    if not means:
        raise ValueError(f"{path}: no line holds 'reward/mean'. Is it the log of an RPT run?")
    return RewardCurve(steps=tuple(sorted(means)), means=tuple(means[step] for step in sorted(means)))
