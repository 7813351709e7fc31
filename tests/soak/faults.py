"""The faults that the soak inflicts on its processes, and the outcome that each must have."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from schedule import Fault
from system import Serve, Trainer

from processes import is_alive

STATUS_SIGNAL = 75
_HANG_S = 20.0
_MENDED = "All weights are written again"
_OTHERS_END_S = 60.0
_PATIENCE_S = 400.0  # a busy machine starts a server in minutes


class FaultFailed(AssertionError):
    """A fault did not have the outcome that it must have."""


@dataclass
class Faults:
    """Makes faults and checks their outcomes.

    ``wait(condition, limit_s)`` waits until the condition is true, the limit passes or the trainer ends. It
    returns whether the condition is true, and samples memory while it waits.
    """

    trainer: Trainer
    serve: Serve
    weights_folder: Path
    disk: Path | None  # a small file system that holds the checkpoints
    wait: Callable[[Callable[[], object], float], bool]

    def make(self, fault: Fault) -> str:
        """Make a fault and return what happened. The trainer may have ended, if the fault should end it."""
        return {
            "kill server": self._kill_server,
            "kill engine": self._kill_server,
            "kill all servers": self._kill_all_servers,
            "hang server": self._hang_server,
            "kill rank": self._kill_ranks,
            "kill trainer": self._kill_ranks,
            "sigterm rank": self._sigterm,
            "sigterm all": self._sigterm,
            "wrong weights": self._wrong_weights,
            "damaged checkpoint": self._damaged_checkpoint,
            "full disk": self._full_disk,
        }[fault.kind](fault)

    # Faults of servers, which the trainer survives.

    def _kill_server(self, fault: Fault) -> str:
        families = self.serve.families()
        if not families:
            return "no server was up"
        port = sorted(families)[int(fault.draw * len(families))]
        family = families[port]
        victim = family[-1] if fault.kind == "kill engine" else family[0]
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
        return (
            f"killed process {family.index(victim) + 1} of {len(family)} of the server on port {port}; "
            f"{self._goes_on()}"
        )

    def _kill_all_servers(self, fault: Fault) -> str:
        fronts = self.serve.fronts()
        for process in fronts.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return f"killed {len(fronts)} servers; {self._goes_on()}"

    def _hang_server(self, fault: Fault) -> str:
        families = self.serve.families()
        if not families:
            return "no server was up"
        port = sorted(families)[int(fault.draw * len(families))]
        _signal(families[port], signal.SIGSTOP)
        end = time.monotonic() + _HANG_S
        self.wait(lambda: time.monotonic() > end, _HANG_S + 5)
        _signal(families[port], signal.SIGCONT)
        return f"stopped the server on port {port} for {_HANG_S:g} s; {self._goes_on()}"

    def _goes_on(self) -> str:
        if not self.trainer.is_running:
            return "the trainer was not running"
        before, start = self.trainer.step(), time.monotonic()
        if not self.wait(lambda: self.trainer.step() >= before + 2, _PATIENCE_S):
            raise FaultFailed(
                f"the trainer did not continue: it is at step {self.trainer.step()} and was at step {before} "
                f"when the fault struck; {self.trainer.text()[-1500:]}"
            )
        return f"two more steps took {time.monotonic() - start:.0f} s"

    # Faults of the trainer. Unless it can mend what is wrong, it must end, and the soak starts it again.

    def _kill_ranks(self, fault: Fault) -> str:
        found, trained = self.trainer.ranks(), self.trainer.trains
        ranks = list(found) if fault.kind == "kill trainer" else [int(fault.draw * len(found))]
        self.trainer.signal(ranks, signal.SIGKILL)
        end = time.monotonic() + _OTHERS_END_S
        # Before the first step nothing watches the ranks yet. The launcher then ends ranks that wait for a
        # dead one.
        while trained and (left := [rank for rank, process in found.items() if is_alive(process)]):
            if time.monotonic() > end:
                raise FaultFailed(
                    f"rank {left} still runs {_OTHERS_END_S:g} s after kill -9 of rank {ranks}: "
                    f"{self.trainer.text()[-1500:]}"
                )
            time.sleep(0.1)
        return self._ends(fault, f"kill -9 of rank {ranks}", statuses=None)

    def _sigterm(self, fault: Fault) -> str:
        self._until_it_trains()
        ranks = [0, 1] if fault.kind == "sigterm all" else [int(fault.draw * 2)]
        self.trainer.signal(ranks, signal.SIGTERM)
        return self._ends(
            fault,
            f"SIGTERM to rank {ranks}",
            statuses=(STATUS_SIGNAL,),
            text="SIGTERM received. Exit status 75",
            saved=True,
        )

    def _wrong_weights(self, fault: Fault) -> str:
        """Corrupt the published weights on disk before the servers read them. They are written again."""
        self._until_it_trains()
        known = set(self._published())
        end = time.monotonic() + _PATIENCE_S
        num_mended = self.trainer.text().count(_MENDED)
        for _ in range(5):
            while not (new := [path for path in self._published() if path not in known]):
                if time.monotonic() > end or not self.trainer.is_running:
                    raise FaultFailed("no new weights were published")
                time.sleep(0.0002)
            known.update(new)
            with contextlib.suppress(FileNotFoundError):
                for file in new[0].glob("*.safetensors"):
                    _zero_tensors(file)
            # The servers may have read the weights before the fault.
            step = self.trainer.step()
            self.wait(lambda step=step: self.trainer.step() >= step + 2, 30)  # type: ignore[misc]
            if not self.trainer.is_running or self.trainer.text().count(_MENDED) > num_mended:
                return f"zeros in {new[0].name}; {self._goes_on()}"
        raise FaultFailed(f"zeros in {new[0].name} went unnoticed: {self.trainer.text()[-1500:]}")

    def _published(self) -> list[Path]:
        return [path for path in self.weights_folder.glob("weights-v*") if path.suffix != ".partial"]

    def _damaged_checkpoint(self, fault: Fault) -> str:
        self._until_it_trains()
        self.wait(lambda: len(self._checkpoints()) >= 2, _PATIENCE_S)
        self.trainer.signal([0, 1], signal.SIGKILL)
        what = self._ends(fault, "kill -9 of rank [0, 1]", statuses=None)
        newest = self._checkpoints()[-1]
        content = bytearray(newest.read_bytes())
        content[int((0.1 + 0.8 * fault.draw) * len(content))] ^= 0xFF
        newest.write_bytes(content)
        return f"{what}, a byte of {newest.name} is changed"

    def _checkpoints(self) -> list[Path]:
        return sorted((self.trainer.folder / "checkpoints").glob("step-*.ckpt"))

    def _full_disk(self, fault: Fault) -> str:
        assert self.disk is not None
        self._until_it_trains()
        filler = self.disk / "other people's data"
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**20))
            return self._ends(
                fault,
                "the disk is full",
                statuses=(1, -signal.SIGTERM, -signal.SIGKILL),
                text="cannot write the checkpoint",
            )
        finally:
            filler.unlink()

    def _until_it_trains(self) -> None:
        if not self.wait(lambda: self.trainer.trains, _PATIENCE_S):
            raise FaultFailed(f"the trainer does not reach its first step: {self.trainer.text()[-1500:]}")

    def _ends(
        self,
        fault: Fault,
        what: str,
        *,
        statuses: tuple[int, ...] | None,
        text: str = "",
        saved: bool = False,
    ) -> str:
        start = time.monotonic()
        self.wait(lambda: not self.trainer.is_running, _PATIENCE_S)
        seconds = time.monotonic() - start
        if self.trainer.is_running:
            raise FaultFailed(
                f"{what}: the trainer still runs after {seconds:.0f} s: {self.trainer.text()[-1500:]}"
            )
        trained = "\nstep " in self.trainer.text()
        life = self.trainer.ended(fault.kind)
        if (statuses is not None and life.status not in statuses) or text not in self.trainer.text():
            raise FaultFailed(
                f"{what}: the trainer ended with {life.status}; expected {statuses} and the text {text!r}: "
                f"{self.trainer.text()[-1500:]}"
            )
        newest = int(self._checkpoints()[-1].stem.removeprefix("step-")) if self._checkpoints() else 0
        if saved and trained and newest != life.last_step:
            raise FaultFailed(
                f"{what}: the newest checkpoint is of step {newest}, but the last step is {life.last_step}"
            )
        return (
            f"{what}: ended with {life.status} at step {life.last_step}, checkpoint {newest}, "
            f"after {seconds:.0f} s"
        )


def small_disk(folder: Path, size_mib: int) -> Path | None:
    """Mount a small file system at this folder. Returns None if mounting is not permitted."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)], capture_output=True
    )
    return folder if done.returncode == 0 else None


def _signal(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _zero_tensors(file: Path) -> None:
    """Zero a file's tensors in place. A server that reads it then gets zeros of the right shapes."""
    with file.open("r+b") as content:
        start = 8 + int.from_bytes(content.read(8), "little")  # the first byte after the header
        size = file.stat().st_size
        content.seek(start)
        content.write(bytes(size - start))
