"""How OpenMP's threads wait for each other on a CPU: asleep, where nobody has chosen otherwise.

The threads of one operation wait for the slowest of them, hundreds of times a step. GNU's runtime, which torch brings along, lets them spin for
milliseconds: on cores that another process uses too, the thread that spins holds the core that the slowest one needs. benchmarks/bench_threads.py measures
what that costs, and docs/performance.md says what came out. The runtime reads its variables when it is loaded, which is when torch is imported; processes
that this one starts (further ranks, servers) inherit them. Nothing heavy is imported here.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

VARIABLE, VALUE = "OMP_WAIT_POLICY", "PASSIVE"  # OpenMP's own, which GNU's and Intel's runtimes both read
# Each says how threads wait; a user who has set one has chosen.
CHOICES = (VARIABLE, "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# As Lightning finds out a process's rank.
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Sets ``OMP_WAIT_POLICY=PASSIVE`` in the process's environment where that helps, and says so in one line (of several ranks the first one says it).

    Call it before torch is imported: afterwards it does nothing.
    """
    if "torch" in sys.modules or not is_to_be_set(environment, computes_on_cpu=computes_on_cpu(environment)):
        return
    environment[VARIABLE] = VALUE
    if next((environment[name] for name in _RANKS if environment.get(name)), "0") == "0":
        print(
            f"rpt: {VARIABLE}={VALUE} was set: threads sleep while they wait for each other, since spinning takes several times as long on cores that "
            f"others use too (to choose yourself, set one of {', '.join(CHOICES)})",
            file=sys.stderr,
            flush=True,
        )


def is_to_be_set(environment: Mapping[str, str], *, computes_on_cpu: bool) -> bool:
    """Whether nobody has chosen how threads wait, and there will be threads that do.

    >>> is_to_be_set({"OMP_NUM_THREADS": "2"}, computes_on_cpu=True)
    True
    >>> is_to_be_set({"OMP_NUM_THREADS": "1"}, computes_on_cpu=True)  # one thread waits for none
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
    """Whether this is a Linux machine (elsewhere nothing was measured) without an NVIDIA driver, or one whose GPUs are all hidden."""
    if sys.platform != "linux":
        return False
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return True
    return (
        shutil.which("nvidia-smi", path=environment.get("PATH")) is None
        and not Path("/dev/nvidiactl").exists()
    )
