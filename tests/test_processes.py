"""No process of a test outlives it, whatever happened to the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from processes import Guarded

# A server that is stopped, with an orphan of its own; the middle process has ended.
TREE = "sh -c 'sleep 1001 & echo orphan $!' & wait; kill -STOP $$"
TEST = f"""
import subprocess, time
from processes import Guarded
server = Guarded(["sh", "-c", {TREE!r}], stdout=subprocess.PIPE, text=True)
print(server.pid, server.process.stdout.readline().split()[1], flush=True)
time.sleep(1000)
"""


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("did not happen")


def status(pid: int) -> str | None:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return None


def is_gone(pid: int) -> bool:
    return status(pid) in (None, psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_test_leaves_nothing(number):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", TEST], stdout=subprocess.PIPE, text=True, env=environment
    ) as test:
        server, orphan = map(int, test.stdout.readline().split())
        wait_until(lambda: status(server) == psutil.STATUS_STOPPED)
        assert not is_gone(orphan)
        test.send_signal(number)
    wait_until(lambda: is_gone(server) and is_gone(orphan))


def test_kill_ends_a_stopped_server_and_its_orphans():
    server = Guarded(["sh", "-c", TREE], stdout=subprocess.PIPE, text=True)
    orphan = int(server.process.stdout.readline().split()[1])
    wait_until(lambda: status(server.pid) == psutil.STATUS_STOPPED)
    server.kill()
    assert is_gone(server.pid)
    assert is_gone(orphan)
    server.kill()
