"""The records of `make evidence`: one JSON file per seed.

For each arm the file holds its numbers, its commands and its outcome at every position.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rpt_lightning.evaluation.run_cost import FLOPS, total
from rpt_lightning.evaluation.run_reader import read_run
from rpt_lightning.evaluation.tables.stages import Rate
from rpt_lightning.records.results import PositionResult

# The questions that a position can be asked, and the field of `PositionResult` that says whether the answer
# was right.
QUESTIONS = {
    "reasoning": "reasoning_correct",
    "ntp": "ntp_correct",
    "empty thought": "empty_thought_correct",
    "shuffled thought": "shuffled_thought_correct",
    "filler thought": "filler_thought_correct",
}
CURVES = {"reward": "reward/mean", "length": "rollout/length_mean", "live": "rollout/live_groups_frac"}


@dataclass(frozen=True, kw_only=True)
class ArmRecord:
    """One arm of one seed.

    ``right`` holds a string of 0 and 1 for each question that was asked, with one character per held-out
    position in the order of ``depths``. ``curves`` holds one value per step, from step 1 on. ``flops`` counts
    the model's operations in training, rollouts included. ``sampled_tokens`` counts the tokens of its
    completions.
    """

    right: dict[str, str]
    depths: tuple[int, ...]
    curves: dict[str, tuple[float, ...]]
    mean_length: float | None
    flops: float
    sampled_tokens: int
    about: dict[str, Any]

    def rate(self, question: str, depths: range | None = None) -> Rate:
        """Return the share of right answers, over all depths or the given ones."""
        marks = self.right.get(question, "")
        return Rate.of(
            [
                mark == "1"
                for mark, depth in zip(marks, self.depths, strict=False)
                if depths is None or depth in depths
            ]
        )

    @property
    def headline(self) -> str:
        return f"reasoning {self.rate('reasoning')}, NTP {self.rate('ntp')}"


def measure(run: Path, *, about: dict[str, Any]) -> ArmRecord:
    """Make a record from a run's last validation and its step log."""
    read = read_run(run)
    results = read.last_validation
    assert results is not None
    positions = sorted(results.positions, key=lambda position: position.task_id)
    lengths = [position.length for position in positions if position.length is not None]
    flops = total(read, FLOPS)
    assert flops is not None
    right = {
        question: text for question, name in QUESTIONS.items() if (text := marks(positions, name)) is not None
    }
    return ArmRecord(
        right=right,
        depths=tuple(_depth(position) for position in positions),
        curves={
            name: tuple(round(value, 4) for value in read.series(metric)[1])
            for name, metric in CURVES.items()
        },
        mean_length=sum(lengths) / len(lengths) if lengths else None,
        flops=flops,
        sampled_tokens=int(sum(read.series("rollout/tokens")[1])),
        about=about,
    )


def marks(positions: list[PositionResult], name: str) -> str | None:
    outcomes = [getattr(position, name) for position in positions]
    return (
        None
        if any(outcome is None for outcome in outcomes)
        else "".join(str(int(outcome)) for outcome in outcomes)
    )


def _depth(position: PositionResult) -> int:
    depth = (position.fields or {})["depth"]
    return int(depth)


def read_records(path: Path) -> dict[str, ArmRecord]:
    """Read the arms of one seed, keyed by name. Returns an empty dict if the file does not exist yet."""
    if not path.exists():
        return {}
    arms = json.loads(path.read_text())
    return {
        name: ArmRecord(
            **{
                **arm,
                "depths": tuple(arm["depths"]),
                "curves": {curve: tuple(values) for curve, values in arm["curves"].items()},
            }
        )
        for name, arm in arms.items()
    }


def write_record(path: Path, name: str, record: ArmRecord) -> None:
    """Add an arm to a seed's file. The replacement is atomic, so the file is always complete."""
    arms = {**read_records(path), name: record}
    lines = ",\n".join(f"{json.dumps(arm)}: {json.dumps(asdict(arms[arm]))}" for arm in sorted(arms))
    replace_text(path, f"{{\n{lines}\n}}\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file such that either the new text or the old one is there, complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
