"""One figure of a benchmark: a ratio measured in one run against a named reference, with its limit."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import torch

RESULTS = Path(__file__).parent / "results"
# If other processes take more than this share of the machine's CPU time, a figure says as much about them as
# about us.
MAX_OTHER_LOAD = 0.15


@dataclass(frozen=True, kw_only=True)
class Result:
    """A stored figure.

    ``lower_is_better`` reverses both limit and target: no value can be below the limit, and a good one is
    below the target.
    """

    name: str
    value: float
    limit: float
    target: float | None
    unit: str
    lower_is_better: bool
    machine: str
    device: str
    threads: int
    torch: str
    commit: str
    date: str
    other_load: float  # share of the machine's CPU time that other processes took during the measurement
    rounds: int = 0  # alternating rounds behind the medians; 0 if nothing was repeated
    seconds: dict[str, float] = field(default_factory=dict)  # median of each side
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_met(self) -> bool | None:
        """Whether the value reaches the target; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.lower_is_better else self.value >= self.target


class _Run:
    """The measurements of this process so far."""

    def __init__(self) -> None:
        self.load = machine.OtherLoad()
        self.rounds = 0
        self.seconds: dict[str, float] = {}
        self.other_load: float | None = None  # of the last alternation


_run = _Run()


def alternate(
    functions: dict[str, Callable[[], object]], repeats: int = 5, *, warm_up: bool = True
) -> dict[str, float]:
    """Return the median seconds of each function.

    Functions run in turn, so other load on the machine affects all of them alike. The first round warms up.

    ``warm_up=False`` is for functions that have just run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    load = machine.OtherLoad()
    for repeat in range(0 if warm_up else 1, repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            print(f"  {'warm-up' if repeat == 0 else f'round {repeat}'} {name}: {elapsed:.3g} s", flush=True)
            if repeat:
                seconds[name].append(elapsed)
    return keep_rounds(seconds, other_load=load.share())


def keep_rounds(seconds: dict[str, list[float]], *, other_load: float) -> dict[str, float]:
    """Return the median seconds of each side, and keep them for the next stored figures.

    This is for benchmarks that time their rounds themselves.
    """
    _run.rounds, _run.seconds = (
        max(map(len, seconds.values())),
        {name: statistics.median(values) for name, values in seconds.items()},
    )
    _run.other_load = other_load
    return dict(_run.seconds)


def store(
    name: str,
    value: float,
    *,
    limit: float,
    target: float | None,
    unit: str,
    lower_is_better: bool | None = None,
    keep: bool = True,
    **details: Any,
) -> None:
    """Print a figure and keep it in ``benchmarks/results/NAME.json``.

    The file also holds the seconds of the process's last alternation.

    Args:
        name: Name of the figure and of its file.
        value: The measured value, in ``unit``.
        limit: The best possible value.
        target: The project's goal, or None if there is none.
        unit: Words that follow the value: "times as fast as ...".
        lower_is_better: Whether lower values are better. None derives it from target and limit.
        keep: Whether to store the figure. A trial with tiny shapes is only printed.
        details: Further facts for the record.
    """
    result = Result(
        name=name,
        value=value,
        limit=limit,
        target=target,
        unit=unit,
        lower_is_better=target is not None and target > limit if lower_is_better is None else lower_is_better,
        machine=machine.description(),
        device=machine.device(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=_commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        other_load=round(_run.load.share() if _run.other_load is None else _run.other_load, 3),
        rounds=_run.rounds,
        seconds=_run.seconds,
        details=details,
    )
    aim = "" if target is None else f", target {target:.3g}: {'met' if result.is_met else 'not met'}"
    print(f"{name}: {value:.3g} {unit} (limit {limit:.3g}{aim})", flush=True)
    if keep and result.other_load > MAX_OTHER_LOAD:
        print(
            f"warning: {name}: other processes took {result.other_load:.0%} of the machine's CPU time; "
            "measure again on an idle machine",
            flush=True,
        )
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(asdict(result), indent=2) + "\n")


def read_results(folder: Path = RESULTS) -> list[Result]:
    """Read all stored figures, sorted by name."""
    return [Result(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def _commit() -> str:
    """Return the commit, and whether files of the project differ from it."""
    options = {"capture_output": True, "text": True, "cwd": Path(__file__).parent}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **options)
    if commit.returncode:
        return "unknown"
    changes = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", "--", "../src", "*.py"], **options
    )
    return commit.stdout.strip() + (" with changes" if changes.stdout.strip() else "")
