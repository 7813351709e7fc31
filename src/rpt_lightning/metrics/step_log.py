"""What every step logged, read back from a run's log file (JSONL, one object an optimizer step, with at least ``step``)."""

from __future__ import annotations

import json
from pathlib import Path


def read_step_log(path: Path) -> dict[int, dict[str, float]]:
    """All metrics by step, steps ascending. What was logged twice for a step (a run that stopped and resumed) counts as it was logged last.

    A last line without its end is not read: the run is just writing it, or was killed there.

    Raises:
        ValueError: the file is missing, or a line is not a JSON object with a step.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such run log. It is written by `rpt fit` into the run's folder.")
    metrics: dict[int, dict[str, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            metrics.setdefault(int(entry["step"]), {}).update(entry)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number}: not JSON ({error}).") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number}: not an object with a step ({error!r}).") from error
    return dict(sorted(metrics.items()))
