"""The machine that measures a figure, and how much of it other processes used meanwhile."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path

import psutil
import torch

BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16", "avx_ne_convert"}


def cpu_model() -> tuple[str, bool]:
    """Return the CPU's name, and whether it has instructions for bf16, which are several times faster."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine(), False
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return fields.get("model name", platform.machine()), bool(flags & BF16_FLAGS)


def description() -> str:
    """Describe the machine in one line, for a table."""
    name, has_bf16 = cpu_model()
    memory_gib = psutil.virtual_memory().total / 2**30
    return (
        f"{name}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, "
        f"{'with' if has_bf16 else 'without'} bf16 instructions"
    )


def device() -> str:
    """Name the device that computes."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


class OtherLoad:
    """Measures the machine's CPU time, from now on, in processes that this one did not start."""

    def __init__(self) -> None:
        self._start = time.monotonic(), _machine_seconds(), _own_seconds()

    def share(self) -> float:
        """Return the share of all cores' time, 0 to 1. Time that a hypervisor takes counts as others'."""
        elapsed, machine, own = (
            time.monotonic() - self._start[0],
            _machine_seconds() - self._start[1],
            _own_seconds() - self._start[2],
        )
        return min(1.0, max(0.0, (machine - own) / (elapsed * (os.cpu_count() or 1)))) if elapsed else 0.0


def _machine_seconds() -> float:
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own_seconds() -> float:
    """Return the CPU seconds of this process, of its running children, and of those that ended.

    Only ended children that were waited for are counted.
    """
    seconds = 0.0
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds
