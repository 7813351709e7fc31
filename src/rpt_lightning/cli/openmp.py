"""Makes OpenMP's threads on a CPU sleep while they wait for each other, unless the user has chosen otherwise.

Hundreds of times a step the threads of one operation wait for the slowest of them. GNU's runtime, which comes
with torch, lets them spin for milliseconds. If another process uses the same cores, a spinning thread
occupies the core that the slowest thread needs. benchmarks/bench_threads.py measures the cost, and
docs/performance.md gives the results. The runtime reads its variables when it is loaded, which is when torch
is imported. Processes that this one starts (further ranks, servers) inherit them. Nothing heavy is imported
here.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

VARIABLE, VALUE = "OMP_WAIT_POLICY", "PASSIVE"  # OpenMP's own; GNU's and Intel's runtimes both read it
# Each of these sets how threads wait. A user who has set one has chosen.
CHOICES = (VARIABLE, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# The variables from which Lightning reads a process's rank.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Set ``OMP_WAIT_POLICY=PASSIVE`` in the process's environment if that helps, and say so in one line.

    Of several ranks only the first says so. Call it before torch is imported: afterwards it does nothing.
    """
    if "torch" in sys.modules or not is_to_be_set(environment, computes_on_cpu=computes_on_cpu(environment)):
        return
    environment[VARIABLE] = VALUE
    if next((environment[name] for name in _RANKS if environment.get(name)), "0") == "0":
        print(
            f"rpt: {VARIABLE}={VALUE} was set: threads sleep while they wait for each other, since spinning "
            "takes several times as long on cores that other processes use too (to choose yourself, set one "
            f"of {', '.join(CHOICES)})",
            file=sys.stderr,
            flush=True,
        )


def is_to_be_set(environment: Mapping[str, str], *, computes_on_cpu: bool) -> bool:
    """Whether the user has not chosen how threads wait, and there will be threads that wait.

    >>> is_to_be_set({"OMP_NUM_THREADS": "2"}, computes_on_cpu=True)
    True
    >>> is_to_be_set({"OMP_NUM_THREADS": "1"}, computes_on_cpu=True)  # a single thread never waits
    False
    >>> is_to_be_set({"GOMP_SPINCOUNT": "300000"}, computes_on_cpu=True)
    False
    """
    return (
        computes_on_cpu
        and environment.get("OMP_NUM_THREADS", "").strip() != "1"
        and not any(name in environment for name in CHOICES)
    )


def computes_on_cpu(environment: Mapping[str, str]) -> bool:
    """Whether this is a Linux machine without an NVIDIA driver, or one whose GPUs are all hidden.

    Nothing was measured on other systems.
    """
    if sys.platform != "linux":
        return False
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return True
    return (
        shutil.which("nvidia-smi", path=environment.get("PATH")) is None
        and not Path("/dev/nvidiactl").exists()
    )
