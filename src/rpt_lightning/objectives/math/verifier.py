"""Compare a prediction with the true answer, by Math-Verify (https://github.com/huggingface/Math-Verify).

This works from any thread. Math-Verify's own time limits are signals, which work only in the main thread and
not while C code runs, and it silently counts its errors as "not equal". Here each comparison runs in another
process (worker.py) with a limit that always holds, and each kind of failure has its own verdict.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from rpt_lightning.objectives.math.number_text import plain_number

MathVerdict = Literal["right", "wrong", "unreadable", "timeout", "error"]
"""The result of one comparison.

``unreadable``: Math-Verify finds nothing in the prediction. ``timeout``: it used up its time. ``error``: it
failed, or its process died.
"""

# The clock limit is this many times the limit of CPU seconds. It is for machines without a CPU limit, and for
# processes that wait.
_CLOCK_FACTOR = 60.0
# Exit status of a process that its own limit ended.
_OUT_OF_CPU_TIME = -int(getattr(signal, "SIGPROF", 0)) or None
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]


class MathVerifier:
    """Compare predictions with true answers in other processes.

    Args:
        cpu_limit_s: CPU seconds that one comparison may use.
        num_workers: Number of processes, each started when it is first needed. Each uses about 100 MB.
    """

    def __init__(self, cpu_limit_s: float = 5.0, num_workers: int = 2) -> None:
        if cpu_limit_s <= 0 or num_workers < 1:
            raise ValueError(
                f"cpu_limit_s={cpu_limit_s}, num_workers={num_workers}: "
                "give more than 0 seconds, and at least 1 process"
            )
        if find_spec("math_verify") is None:
            raise ValueError(
                "checking mathematical answers needs the package math-verify: "
                "pip install 'math-verify>=0.9,<0.10'"
            )
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="math-verify")
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(num_workers):
            self._workers.put(_Worker(cpu_limit_s))

    def verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[MathVerdict]:
        """Return one verdict for each (true answer, prediction), both as contents of a box.

        Equal pairs are compared once. A number as programs write it (``1e-05``) is compared in digits.
        """
        plain = [(plain_number(answer), plain_number(prediction)) for answer, prediction in pairs]
        unique = list(dict.fromkeys(plain))
        found = dict(zip(unique, self._threads.map(self._verdict, unique), strict=True))
        return [found[pair] for pair in plain]

    def _verdict(self, pair: tuple[str, str]) -> MathVerdict:
        worker = self._workers.get()
        try:
            return worker.verdict(pair)
        finally:
            self._workers.put(worker)


class _Worker:
    """One process. It ends when this object's pipe to it is closed, and so ends with the run in any case."""

    def __init__(self, cpu_limit_s: float) -> None:
        self.cpu_limit_s = cpu_limit_s
        self._process: subprocess.Popen[str] | None = None

    def verdict(self, pair: tuple[str, str]) -> MathVerdict:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        ended_by_clock = threading.Event()

        def end() -> None:
            ended_by_clock.set()
            process.kill()

        watch = threading.Timer(_CLOCK_FACTOR * self.cpu_limit_s, end)
        watch.start()
        try:
            process.stdin.write(json.dumps(pair) + "\n")
            process.stdin.flush()
            answer = _read(process)
        except BrokenPipeError:  # it has died since the last comparison
            answer = None
        finally:
            watch.cancel()
        if answer is None:
            self._process = None
            return "timeout" if process.wait() == _OUT_OF_CPU_TIME or ended_by_clock.is_set() else "error"
        return answer if answer in get_args(MathVerdict) else "error"

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "rpt_lightning.objectives.math.worker", str(self.cpu_limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": path},
        )
        if _read(process) != "ready":
            raise RuntimeError(
                f"Math-Verify's process ended with status {process.wait()} "
                "before its first answer was checked; see its output above"
            )
        return process


def _read(process: subprocess.Popen[str]) -> Any:
    """Read the next line's value. Returns None if the process ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line.endswith("\n") else None
