"""`rpt fit` as real processes that can be killed, and the traces of a run, for comparing two runs bit by bit.

The processes are forked from one that has imported everything and computed nothing. A fresh interpreter would
spend seconds on imports each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from rpt_lightning.objectives.rewards.next_token import Reward

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Entries of the step log that depend on the clock, the machine and the number of starts.
# A server that comes late, or a trainer that has just started, gets all weights and not only what changed.
UNEQUAL = ("time", "perf/", "run/", "cost/time_s", "sync/sent_bytes", "sync/full_bytes")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["rpt_lightning.cli.run"])


class SomeAreRight(Reward):
    """Half of the completions are right, whatever they say.

    A random model's own answers would all get the same reward, and every run would be the same.
    """

    def group_rewards(self, answered):
        seeds = [
            f"{answered.task.task_id} {index} {prediction!r}".encode()
            for index, prediction in enumerate(answered.predictions)
        ]
        return tuple(float(hashlib.sha256(seed).digest()[0] < 128) for seed in seeds)


class HeldValidation(Callback):
    """Holds validation back while the file is there. Another file, ``.begun``, shows that one is due.

    After ten minutes it begins anyway, so that a failed test leaves no process behind.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        end = time.monotonic() + 600
        self.file.with_suffix(".begun").touch()
        while self.file.exists() and time.monotonic() < end:
            time.sleep(0.01)


class FailsAtStepTwo(Callback):
    """Raises an error on the last rank."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            raise ValueError("a shard is damaged")


class KilledOnce(Callback):
    """The last rank kills itself after step 2, unless the file says that it already did so.

    A step takes at least a second.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        time.sleep(1)
        if (
            trainer.global_step == 2
            and trainer.global_rank == trainer.world_size - 1
            and not self.file.exists()
        ):
            self.file.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def run_cli(args: list[str], log: str, environment: dict[str, str]) -> None:
    """Run the command in the new process."""
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    torch.set_num_threads(1)
    from rpt_lightning.cli import main

    sys.exit(main(args))


class RealRun:
    """One command in one folder, which can be started, killed and started again."""

    def __init__(self, folder: Path, flags: list[Any]) -> None:
        self.folder = folder
        self.args = [
            "fit",
            *map(str, flags),
            "--trainer.default_root_dir",
            str(folder),
            "--ckpt_path",
            "auto",
        ]
        self.log = folder.parent / f"{folder.name}.log"
        self.process: Any = None

    def start(self, **environment: str) -> None:
        self.process = _context.Process(target=run_cli, args=(self.args, str(self.log), environment))
        self.process.start()

    def send(self, signum: int) -> None:
        os.kill(self.process.pid, signum)

    def status(self, timeout_s: float = 240) -> int:
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still running after {timeout_s} s:\n{self.text()}"
        return self.process.exitcode

    def finish(self, **environment: str) -> None:
        self.start(**environment)
        assert self.status() == 0, self.text()

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 120) -> bool:
        """Wait until the condition holds. False if the process ended first."""
        end = time.monotonic() + timeout_s
        while not condition():
            if not self.process.is_alive():
                return False
            assert time.monotonic() < end, f"nothing after {timeout_s} s:\n{self.text()}"
            time.sleep(0.0005)
        return True

    def kill_when(self, condition: Callable[[], object], *, after_s: float = 0.0) -> bool:
        """Send kill -9 when the condition holds. False if the run was already done."""
        if not self.wait_for(condition):
            return False
        time.sleep(after_s)
        self.process.kill()
        return self.status() != 0

    def start_command(self, *launcher: str) -> subprocess.Popen[bytes]:
        """Start the command with its own interpreter or with another launcher.

        Lightning needs its own interpreter if it starts further ranks. An example of a launcher is ``-m
        torch...run --module``.
        """
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, *(launcher or ["-m"]), "rpt_lightning.cli", *self.args]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            )

    def wait_for_text(self, text: str, process: subprocess.Popen[bytes], timeout_s: float = 180) -> None:
        end = time.monotonic() + timeout_s
        while text not in self.text():
            assert process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.1)

    @staticmethod
    def ends(pid: int, *, within_s: float, process: subprocess.Popen[bytes]) -> bool:
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            process.poll()  # or it would stay as a zombie
            stat = Path(f"/proc/{pid}/stat")
            if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
            time.sleep(0.2)
        return False

    @staticmethod
    def end(pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def step(self) -> int:
        """Number of logged steps.

        A start that follows one without a checkpoint moves that one's log aside.
        """
        try:
            return (self.folder / "steps.jsonl").read_text().count("\n")
        except FileNotFoundError:
            return 0

    def writes_a_checkpoint(self) -> bool:
        return any((self.folder / "checkpoints").glob("*.partial"))

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


def traces(folder: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on interruptions.

    That is steps, rollouts, validations, weights, optimizer and place in the data.
    """
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    newest = sorted((folder / "checkpoints").glob("step-*.ckpt"))[-1]
    saved = torch.load(newest, weights_only=True)
    return {
        "steps": [
            {name: value for name, value in step.items() if not name.startswith(UNEQUAL)} for step in steps
        ],
        "rollouts": {path.name: path.read_text() for path in sorted((folder / "rollouts").glob("*.jsonl"))},
        "validation": {
            path.name: path.read_text()
            for path in sorted((folder / "validation").glob("*.json*"))
            if path.suffix != ".abandoned"
        },
        "checkpoint": newest.name,
        "weights": saved["state_dict"],
        "optimizer": saved["optimizer_states"],
        "place in the data": {name: value for name, value in saved.items() if name.endswith("DataModule")},
    }


def differences(one: Any, two: Any, where: str = "") -> list[str]:
    """Paths at which two traces differ, even in a single bit."""
    if isinstance(one, dict) and isinstance(two, dict):
        names = sorted({*one, *two}, key=str)
        return [
            found
            for name in names
            for found in (
                [f"{where}/{name} is missing"]
                if name not in one or name not in two
                else differences(one[name], two[name], f"{where}/{name}")
            )
        ]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [
            found
            for index, pair in enumerate(zip(one, two, strict=True))
            for found in differences(*pair, f"{where}/{index}")
        ]
    same = (
        torch.equal(one, two)
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor)
        else one == two
    )
    return [] if same else [where]


def scripted_flags(model: Path, tasks: Path, *, steps: int, engine: str = "ScriptedEngine") -> list[Any]:
    """A small run that saves, validates and keeps its rollouts at every step or every second step."""
    from small_run import SCRIPT

    config = yaml.safe_load((CONFIGS / "debug.yaml").read_text())
    config["trainer"] |= {"max_steps": steps, "val_check_interval": 2}
    config["model"]["init_args"]["policy"]["init_args"]["path"] = str(model)
    config["data"]["init_args"] |= {
        "task_dir": str(tasks),
        "tasks_per_step": 4,
        "positions_per_document": 2,
        "num_eval_tasks": 4,
    }
    config["rollout"] |= {
        "max_prompt_tokens": 96,
        "dynamic_sampling": {"from_step": 1, "max_factor": 2.0},
        "evaluation": {"thought_controls": False},
    }
    config["rollout"]["sampling"] |= {"max_completion_tokens": 24}
    config["rollout"]["objective"]["init_args"]["reward"] = {"class_path": "real_runs.SomeAreRight"}
    if engine == "ScriptedEngine":
        config["rollout"]["engine"] = {"class_path": engine, "init_args": {"completions": SCRIPT}}
    config["checkpoint"] = {"every_n_steps": 1, "keep": 2, "keep_every_n_steps": 4}
    path = tasks.parent / f"real-run-{engine}-{steps}.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", path]
