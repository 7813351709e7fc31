"""A soak test: a small run of two ranks and two servers that suffers a fault every minute.

    # Real vLLM servers; we estimate about 45 minutes in all (`make soak`).
    python tests/soak/soak.py --minutes 30
    # Stand-in servers.
    python tests/soak/soak.py --minutes 3 --every_s 20 --servers stand-in

The seed sets the schedule of the faults. The step at which each one strikes depends on the machine. At the
end, every task must have been rolled out once. The whole run is then repeated without faults on the same
completions and must reach the same weights, bit for bit. The result is ``soak.json`` in the folder, and the
exit status.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

sys.path[:0] = [
    str(Path(__file__).resolve().parent),
    *(str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "training")),
]

import psutil
import yaml
from checks import (
    check_leftovers,
    check_memory,
    check_replay,
    check_restarts,
    check_steps,
    check_tasks,
    step_rows,
)
from faults import FaultFailed, Faults, small_disk
from memory import MemoryLog
from schedule import Fault, make_schedule
from system import HERE, Serve, Trainer

from processes import free_port

ROOT = HERE.parents[1]
GROUP_SIZE = 4
DATA = {"tasks_per_step": 8, "positions_per_document": 2, "num_eval_tasks": 8, "eval_batch_size": 8}
_LAST_STEPS = 4  # after the last fault, before the run ends normally
_READY_S = 600.0


class Soak:
    def __init__(self, folder: Path, *, servers: str, seed: int) -> None:
        self.folder = folder
        self.servers = servers
        self.seed = seed
        self.ports = [free_port(), free_port()]
        self.memory = MemoryLog()
        self.failures: list[str] = []
        self.events: list[dict[str, Any]] = []
        self._start_s = time.monotonic()

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._start_s

    def prepare(self) -> None:
        """Make the model, tasks, configurations, small disk and servers."""
        if self.folder.exists():
            raise SystemExit(f"{self.folder} exists; remove it, or give another --folder")
        self.run_folder, self.weights, self.recordings = (
            self.folder / "run",
            self.folder / "weights",
            self.folder / "recordings",
        )
        logs = self.folder / "logs"
        for path in (self.run_folder, self.recordings, logs):
            path.mkdir(parents=True)
        model = self.folder / "model"
        _load_script("make_model").make("tiny", model)
        _prepare_tasks(model, self.folder / "tasks")
        self.disk = small_disk(self.run_folder / "checkpoints", size_mib=256)
        urls = [f"http://127.0.0.1:{port}" for port in self.ports]
        transport = {"class_path": "SharedFolderTransport", "init_args": {"folder": str(self.weights)}}
        limits = {
            "urls": urls,
            "dtype": "float32",
            "timeout_s": 10.0,
            "max_wait_s": 600.0,
            "transport": transport,
        }
        recorded = {
            "class_path": "recorded_servers.RecordedServers",
            "init_args": {"recordings": str(self.recordings), **limits},
        }
        self._configure("fit", recorded)
        self._configure("serve", {"class_path": "VLLMServerEngine", "init_args": limits})
        self._configure(
            "replay",
            {"class_path": "recorded_servers.Replay", "init_args": {"recordings": str(self.recordings)}},
        )
        key = {"RPT_SERVER_KEY": secrets.token_hex(16)}
        os.environ |= key
        if self.servers == "vllm":
            # On the CPU the KV cache becomes resident block by block on first use, which takes minutes. A
            # small cache can neither look like a leak nor hide one. oneDNN also keeps primitives for each
            # batch size that it meets: 1,024 by default, which took 350 MiB here. We limit those for the
            # same reason.
            key |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
            flags = [
                "--serve.kv_cache_gib",
                "0.03",
                "--serve.max_num_seqs",
                "16",
                "--serve.log_folder",
                str(logs),
            ]
            command = [
                sys.executable,
                "-m",
                "rpt_lightning.cli",
                "serve",
                "--config",
                str(self.folder / "serve.yaml"),
                *flags,
            ]
        else:
            command = [
                sys.executable,
                str(HERE / "serve_stand_ins.py"),
                str(model),
                str(logs),
                *map(str, self.ports),
            ]
        self.serve = Serve(command, logs / "serve.log", self.ports, key)
        self.trainer = Trainer(self.folder / "fit.yaml", self.run_folder, logs)

    def _configure(self, name: str, engine: dict[str, Any]) -> None:
        config = yaml.safe_load((ROOT / "configs" / "debug.yaml").read_text())
        config["trainer"] = {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": "ddp",
            "max_steps": 1_000_000,
            "val_check_interval": 20,
        }
        config["trainer"]["default_root_dir"] = str(self.run_folder)
        config["model"]["init_args"]["policy"]["init_args"]["path"] = str(self.folder / "model")
        config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 1e-4
        config["data"]["init_args"] = {"task_dir": str(self.folder / "tasks"), **DATA}
        config["rollout"] |= {
            "engine": engine,
            "group_size": GROUP_SIZE,
            "max_prompt_tokens": 96,
        }
        config["rollout"]["sampling"] |= {"max_completion_tokens": 24}
        config["rollout"]["dynamic_sampling"] |= {"from_step": 1}
        config["rollout"] |= {
            "evaluation": {"thought_controls": False},
            "check": {"verify_sequences": 4 if self.servers == "vllm" else 0},
        }
        # A random model is never right, so this reward makes some completions right.
        config["rollout"]["objective"]["init_args"]["reward"] = {"class_path": "real_runs.SomeAreRight"}
        config["checkpoint"] = {"every_n_steps": 3, "keep": 2}
        config["ranks"] = {"limit_s": 20.0}
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def disturb(self, faults: list[Fault], duration_s: float) -> None:
        self.serve.wait_until_ready(_READY_S)
        self._start_s = time.monotonic()
        self._say(f"{self.servers} servers on ports {self.ports}, {len(faults)} faults in {duration_s:.0f} s")
        self._start_trainer()
        maker = Faults(self.trainer, self.serve, self.weights, self.disk, self._wait)
        for fault in faults:
            self._watch_until(fault.at_s)
            before = self.now_s
            # Each fault waits until the run has recovered from the one before, which is slow on a busy
            # machine.
            if before > duration_s:
                self.events.append(
                    {"due_s": round(fault.at_s), "kind": fault.kind, "outcome": "not made: no time was left"}
                )
                continue
            try:
                outcome = maker.make(fault)
            except FaultFailed as error:
                outcome = f"FAILED: {error}"
                self.failures.append(f"{fault.kind} at {before:.0f} s: {error}")
            self.events.append(
                {"at_s": round(before), "due_s": round(fault.at_s), "kind": fault.kind, "outcome": outcome}
            )
            self._say(f"{fault.kind}: {outcome}")
            self._start_again()
            if fault.kind == "damaged checkpoint":
                self._wait(lambda: self.trainer.trains, 400)
                if "is damaged" not in self.trainer.text():
                    self.failures.append(
                        f"the trainer did not report a damaged checkpoint: {self.trainer.text()[-1500:]}"
                    )
        self._watch_until(duration_s)

    def finish(self) -> int:
        """Send SIGTERM, then run a few more steps to a normal end. Returns the number of steps."""
        self._wait(lambda: self.trainer.trains, 400)
        self.trainer.signal([0, 1], signal.SIGTERM)
        self._wait(lambda: not self.trainer.is_running, 400)
        life = self.trainer.ended("end")
        if life.status != 75:
            self.failures.append(
                f"SIGTERM at the end gave status {life.status}: {self.trainer.text()[-1500:]}"
            )
        num_steps = self.trainer.step() + _LAST_STEPS
        self.trainer.start(self.now_s, "--trainer.max_steps", str(num_steps))
        self._wait(lambda: not self.trainer.is_running, 400)
        life = self.trainer.ended("done")
        if life.status != 0:
            self.failures.append(f"the last life ended with {life.status}: {self.trainer.text()[-1500:]}")
        self.num_server_restarts = self.serve.num_restarts()
        if (status := self.serve.stop()) != 0:
            self.failures.append(f"the servers' supervisor ended with {status}")
        self._say(
            f"done with {num_steps} steps in {len(self.trainer.lives)} lives; "
            f"{self.num_server_restarts} server restarts"
        )
        return num_steps

    def replay(self, num_steps: int) -> Path:
        """Repeat the run without faults or servers, on the recorded completions."""
        replay = Trainer(self.folder / "replay.yaml", self.folder / "replay", self.folder / "logs" / "replay")
        replay.log_folder.mkdir()
        replay.start(
            self.now_s,
            "--trainer.max_steps",
            str(num_steps),
            "--trainer.limit_val_batches",
            "0",
            "--checkpoint.every_n_steps",
            "100000",
        )
        while replay.is_running:
            time.sleep(0.5)
        life = replay.ended("done")
        if life.status != 0:
            self.failures.append(f"the replay ended with {life.status}: {replay.text()[-1500:]}")
        return replay.folder

    def check(self, num_steps: int, replay_folder: Path) -> dict[str, list[str]]:
        from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule

        self.growths = self.memory.growths()
        data = TokenTaskDataModule(str(self.folder / "tasks"), **DATA)
        return {
            "faults had the outcome that they must have": self.failures,
            f"steps 1 to {num_steps}, each once, the last one saved": check_steps(self.run_folder, num_steps),
            "no task lost or doubled": check_tasks(
                self.run_folder, self.recordings, data, group_size=GROUP_SIZE
            ),
            "weights, optimizer and place are those of an undisturbed run, bit for bit": check_replay(
                self.run_folder, replay_folder
            ),
            "memory is flat": check_memory(self.growths),
            "restarts are counted": check_restarts(self.run_folder, len(self.trainer.lives)),
            "nothing is left": check_leftovers(self.run_folder, self.weights),
        }

    def record(self, num_steps: int, checks: dict[str, list[str]], settings: dict[str, Any]) -> None:
        cpu = next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            platform.machine(),
        )
        content = {
            "settings": settings,
            "machine": {"cpu": cpu, "cores": os.cpu_count()},
            "steps": num_steps,
            "seconds": round(self.now_s),
            "replaced_groups": sum(int(row["rollout/replaced_groups"]) for row in step_rows(self.run_folder)),
            "trainer_lives": [asdict(life) for life in self.trainer.lives],
            "server_restarts": self.num_server_restarts,
            "faults": self.events,
            "memory": [asdict(growth) for growth in self.growths],
            "checks": {name: wrong or "ok" for name, wrong in checks.items()},
        }
        (self.folder / "soak.json").write_text(json.dumps(content, indent=2) + "\n")

    def close(self) -> None:
        if hasattr(self, "serve"):
            self.serve.kill()
        if hasattr(self, "trainer") and self.trainer.lives:
            self.trainer.ended("clean-up")
        if getattr(self, "disk", None) is not None:
            kept = self.folder / "checkpoints"
            shutil.copytree(self.disk, kept, dirs_exist_ok=True)
            subprocess.run(["umount", "-l", str(self.disk)], check=False)

    def _watch_until(self, at_s: float) -> None:
        """Wait until the given time. If the trainer ends without a fault, record a failure and restart it."""
        while self.now_s < at_s:
            if (
                not self._wait(lambda: self.now_s >= at_s, at_s - self.now_s + 1)
                and not self.trainer.is_running
            ):
                self.failures.append(
                    f"the trainer ended on its own at {self.now_s:.0f} s: {self.trainer.text()[-3000:]}"
                )
                self._say(self.failures[-1])
            self._start_again()

    def _wait(self, condition: Any, limit_s: float) -> bool:
        end = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > end or not self.trainer.is_running:
                return bool(condition())
            self.memory.sample(self._processes)
            time.sleep(0.2)
        return True

    def _processes(self) -> dict[str, psutil.Process]:
        found = {f"rank {rank}": process for rank, process in self.trainer.ranks().items()}
        for port, family in self.serve.families().items():
            number = self.ports.index(port) + 1
            found |= {
                f"server {number}, process {index}": process for index, process in enumerate(family, start=1)
            }
        return found

    def _start_again(self) -> None:
        if not self.trainer.is_running:
            if self.trainer.lives[-1].status is None:
                self.trainer.ended("unexpected")
            self._start_trainer()

    def _start_trainer(self) -> None:
        self.trainer.start(self.now_s)

    def _say(self, text: str) -> None:
        print(f"[{self.now_s:6.0f} s, step {self.trainer.step():4}] {text}", flush=True)


def _load_script(name: str) -> Any:
    spec = spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prepare_tasks(model: Path, output: Path) -> None:
    from rpt_lightning.data.prepare.prepare_command import prepare
    from rpt_lightning.data.sources.corpus import DocstringSource

    limits = {
        "entropy_threshold": 0.5,
        "min_context": 4,
        "max_tokens_per_document": 64,
        "max_documents": 64,
        "heldout_documents": 4,
        "window": 256,
        "overlap": 64,
    }
    prepare(
        DocstringSource("unittest"),
        str(output),
        tokenizer=str(model),
        proxy=str(model),
        precision="32-true",
        **limits,
    )


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=30.0,
        help="minutes of faults; start, end and replay take more",
    )
    parser.add_argument("--every_s", type=float, default=60.0, help="seconds between faults")
    parser.add_argument("--seed", type=int, default=0, help="seed of the schedule")
    parser.add_argument("--servers", choices=["vllm", "stand-in"], default="vllm")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    settings = parser.parse_args(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("soak: SIGTERM"))  # so that clean-up runs
    soak = Soak(settings.folder.resolve(), servers=settings.servers, seed=settings.seed)
    try:
        soak.prepare()
        leave_out = () if soak.disk is not None else ("full disk",)
        faults = make_schedule(
            seed=settings.seed,
            duration_s=60 * settings.minutes,
            every_s=settings.every_s,
            leave_out=leave_out,
        )
        if leave_out:
            print("mounting a file system is not permitted here, so the full-disk fault is left out")
        soak.disturb(faults, 60 * settings.minutes)
        num_steps = soak.finish()
        checks = soak.check(num_steps, soak.replay(num_steps))
        soak.record(num_steps, checks, vars(settings) | {"folder": str(settings.folder)})
    finally:
        soak.close()
    for growth in soak.growths:
        print(
            f"memory of {growth.name}, {growth.life_s:.0f} s: "
            f"{growth.first_mib:.0f} -> {growth.last_mib:.0f} MiB"
        )
    for name, wrong in checks.items():
        print(
            f"{'FAILED' if wrong else 'ok    '} {name}", *(f"         {text}" for text in wrong[:5]), sep="\n"
        )
    return int(any(checks.values()))


if __name__ == "__main__":
    sys.exit(main())
