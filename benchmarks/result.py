"""One figure of a benchmark: a ratio measured in one run against a named reference, with the limit beside it."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def alternate(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, run in turn so that what else the machine does falls on all of them alike; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            print(f"  {'warm-up' if repeat == 0 else f'round {repeat}'} {name}: {elapsed:.2f} s", flush=True)
            if repeat:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def store(name: str, value: float, *, limit: float, target: float | None, unit: str, keep: bool = True) -> None:
    """Prints a figure and keeps it in ``benchmarks/results/NAME.json``; a trial at tiny shapes is not worth keeping."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    figure = {"name": name, "value": value, "limit": limit, "target": target, "unit": unit, "machine": machine, "commit": commit}
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(figure, indent=2) + "\n")
    aim = "" if target is None else f", target {target:.2f}"
    print(f"{name}: {value:.2f} {unit} (limit {limit:.2f}{aim})")
