"""Processes that must not outlive a test.

This includes a stopped process, the children of a dead one, and the case that the test itself is killed.

Run as ``python processes.py PID`` it is a guard. It waits for the end of its standard input, which comes when
the holder of the other end closes it or dies. Then it kills that process and everything that came from it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time

import psutil


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Guarded:
    """A process in a session of its own, with a guard beside it."""

    def __init__(self, command: list[str] | tuple[str, ...], **options) -> None:
        self.process = subprocess.Popen(command, start_new_session=True, **options)
        self.pid = self.process.pid
        guard = [sys.executable, __file__, str(self.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the process and its whole session, such as the engine and workers of a server."""
        os.killpg(self.pid, number)

    def cpu_s(self) -> float:
        """Seconds that the process and its present descendants have computed."""
        total = 0.0
        for process in [self.pid, *(child.pid for child in _descendants(self.pid))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = psutil.Process(process).cpu_times()
                total += times.user + times.system
        return total

    def kill(self) -> None:
        """Kill everything and return when nothing is left. May be called twice."""
        kill_family(self.pid)
        self.process.wait()
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        assert self._guard.wait(60) == 0


def kill_family(pid: int) -> None:
    """kill -9 for a process, its descendants, and everything else in their sessions.

    An orphan's parent is no longer known, but its session is.
    """
    sessions = {pid, *(_session(process) for process in _descendants(pid))} - {None, os.getsid(0)}
    end = time.monotonic() + 30
    while members := [
        process for process in psutil.process_iter() if _session(process) in sessions and is_alive(process)
    ]:
        assert time.monotonic() < end, f"still there: {members}"
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # ends a stopped process too
        time.sleep(0.02)


def _descendants(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None


def is_alive(process: psutil.Process) -> bool:
    """A zombie is not alive. It is not reaped either: that is its parent's job."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    sys.stdin.read()
    kill_family(int(sys.argv[1]))
