"""Read back what every step logged.

The log file of a run is JSONL with one object for each optimizer step, which has at least ``step``.
"""

from __future__ import annotations

import json
from pathlib import Path


def read_step_log(path: Path) -> dict[int, dict[str, float]]:
    """Read all metrics, keyed by step in ascending order.

    If a step was logged twice (a run that stopped and resumed), the later values count. A last line without
    its line break is not read, because the run is still writing it or was killed there.

    Raises:
        ValueError: The file is missing or not UTF-8, or a line is not a JSON object of numbers with a step.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such run log. It is written by `rpt fit` into the run's folder.")
    metrics: dict[int, dict[str, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). Was it damaged during a copy?") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: not JSON ({error}).") from error
        if not isinstance(entry, dict) or type(entry.get("step")) is not int or entry["step"] < 0:
            raise ValueError(
                f"{path} line {number}: not an object with a step, which is a whole number; fix or remove "
                "the line."
            )
        for name, value in entry.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(
                    f"{path} line {number}: {name} is {value!r}, where a number belongs; fix or remove "
                    "the line."
                )
        metrics.setdefault(entry["step"], {}).update(entry)
    return dict(sorted(metrics.items()))
