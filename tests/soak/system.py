"""The processes of the soak's two commands.

`rpt fit` runs with two ranks. `rpt serve` runs with two servers, or its supervisor runs with stand-in
servers.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from recorded_servers import LIFE_VARIABLE

from processes import Guarded

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
# Where the trainer finds the soak's engines and the tests' reward.
PYTHONPATH = os.pathsep.join(
    [str(HERE), str(TESTS / "training"), str(TESTS), os.environ.get("PYTHONPATH", "")]
)


@dataclass
class Life:
    """One start of the trainer. Times are in seconds since the start of the soak."""

    number: int
    started_s: float
    first_step: int  # the number of logged steps when it started
    last_step: int | None = None
    status: int | None = None
    ended_by: str | None = None


class Trainer:
    """One training run. It may take several lives."""

    def __init__(self, config: Path, run_folder: Path, log_folder: Path) -> None:
        self.config = config
        self.folder = run_folder
        self.log_folder = log_folder
        self.lives: list[Life] = []
        self._process: Guarded | None = None
        self._ranks: dict[int, psutil.Process] = {}

    def start(self, now_s: float, *more: str) -> None:
        self.lives.append(Life(number=len(self.lives) + 1, started_s=now_s, first_step=self.step()))
        flags = [
            "--config",
            str(self.config),
            "--trainer.default_root_dir",
            str(self.folder),
            "--ckpt_path",
            "auto",
            *more,
        ]
        environment = os.environ | {
            "PYTHONPATH": PYTHONPATH,
            "OMP_NUM_THREADS": "1",
            LIFE_VARIABLE: str(len(self.lives)),
        }
        with self._log.open("w") as log:
            self._process = Guarded(
                [sys.executable, "-m", "rpt_lightning.cli", "fit", *flags],
                stdout=log,
                stderr=log,
                env=environment,
            )

    @property
    def _log(self) -> Path:
        return self.log_folder / f"trainer-{self.lives[-1].number:03}.log"

    def text(self) -> str:
        """Return the output of the current life."""
        return self._log.read_text(errors="replace")

    def step(self) -> int:
        """Return the number of steps in the log."""
        path = self.folder / "steps.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    @property
    def trains(self) -> bool:
        """Whether the current life is running and has completed a step."""
        return self.is_running and "\nstep " in self.text()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.is_running

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes by rank. Lightning's first rank starts the other, which takes some seconds."""
        if self._process is None:
            return {}
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._process.pid)
            found[0] = first
            for child in first.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "rpt_lightning.cli" in child.cmdline():
                        found[1] = child
        return found

    def signal(self, ranks: list[int], number: int) -> None:
        for rank, process in self.ranks().items():
            if rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def ended(self, why: str) -> Life:
        """Complete the record of the current life.

        Call this when the process has ended, or to end it. No part of it is left running.
        """
        assert self._process is not None
        self._process.kill()
        life = self.lives[-1]
        life.status, life.ended_by, life.last_step = self._process.process.returncode, why, self.step()
        return life


class Serve:
    """The servers and their supervisor.

    Server processes are looked up by port on each call, because the supervisor restarts a server that ended.
    """

    def __init__(
        self, command: list[str], log: Path, ports: list[int], environment: Mapping[str, str]
    ) -> None:
        self.ports = ports
        self.log = log
        with log.open("w") as output:
            self._process = Guarded(
                command,
                stdout=output,
                stderr=output,
                env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"} | environment,
            )

    def wait_until_ready(self, limit_s: float) -> None:
        end = time.monotonic() + limit_s
        while "servers are ready" not in self.log.read_text():
            if not self._process.is_running or time.monotonic() > end:
                raise RuntimeError(
                    f"the servers did not come up within {limit_s:g} s:\n{self.log.read_text()[-3000:]}"
                )
            time.sleep(0.2)

    @property
    def is_running(self) -> bool:
        return self._process.is_running

    def fronts(self) -> dict[int, psutil.Process]:
        """Return the processes that serve HTTP, by port. A server that is restarting is missing."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    words = " ".join(child.cmdline()).replace("=", " ").split()
                    if "--port" in words:
                        found[int(words[words.index("--port") + 1])] = child
        return found

    def families(self) -> dict[int, list[psutil.Process]]:
        """Return each server's processes by port, starting with the one that serves HTTP."""
        found = {}
        for port, front in self.fronts().items():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[port] = [front, *front.children(recursive=True)]
        return found

    def num_restarts(self) -> int:
        return self.log.read_text().count("ended with status")

    def stop(self) -> int:
        """Stop the servers with SIGTERM, as a user would. Returns the exit status."""
        self._process.process.terminate()
        status = self._process.process.wait(90)
        self._process.kill()
        return status

    def kill(self) -> None:
        self._process.kill()
