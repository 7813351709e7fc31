"""`make demo`: text in, a policy trained by next-token reasoning out, then a table and a plot. Interrupted, it continues where it stopped.

Every stage is one command that a user could type; the demo only runs them in order and keeps the time.
"""

from __future__ import annotations

import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from rpt_lightning.training.cpu_precision import bf16_is_slow

MODEL = Path("models/smollm2-135m")
TASKS = Path("tasks/demo")
DEMO = Path("runs/demo")
COLD_START = DEMO / "cold-start"
RPT = DEMO / "rpt"
TIMES = DEMO / "times.json"  # seconds that each stage took, over all calls of the demo
EXECUTABLE = str(Path(sys.executable).with_name("rpt"))
ROOT = Path(__file__).resolve().parents[1]
# There is a vLLM for Linux only; elsewhere transformers makes the rollouts, which is slower.
HAS_VLLM = platform.system() == "Linux"
# Many CPUs have no instructions for bf16; there fp32 is several times faster, and no less exact.
IN_FP32 = bf16_is_slow()
PRECISION = ("--trainer.precision", "32-true") if IN_FP32 else ()
PREPARE_PRECISION = ("--precision", "32-true") if IN_FP32 else ()
ENGINE = (*(() if HAS_VLLM else ("--rollout.engine", "HFEngine")), *(("--rollout.engine.dtype", "float32") if IN_FP32 else ()))
Command = Callable[[], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``output`` is what the command leaves behind, ``minutes`` about how long it takes on two cores. The command is made when the stage begins.

    ``run_folder`` is a fit's: its output is its last checkpoint, which alone shows that the fit is over. ``feeds_later`` is whether later stages use
    what this one makes.
    """

    name: str
    command: Command
    output: Path
    minutes: float
    run_folder: Path | None = None
    feeds_later: bool = True

    @property
    def _mark(self) -> Path:
        return DEMO / "finished" / self.name.replace(" ", "-")

    @property
    def is_finished(self) -> bool:
        # Other outputs may exist before they are complete or be those of an earlier policy, so finishing leaves a mark.
        return self.output.exists() and (self.run_folder is not None or self._mark.exists())

    def forget(self) -> None:
        """What this stage made came from something that is made again now."""
        self._mark.unlink(missing_ok=True)
        forget_time(self.name)
        if self.run_folder is not None and self.run_folder.exists():
            aside = self.run_folder.with_name(self.run_folder.name + ".old")
            shutil.rmtree(aside, ignore_errors=True)
            self.run_folder.rename(aside)
            print(f"demo: an earlier stage runs again, so {self.run_folder} is made anew; the run that was there is now {aside}")

    def run(self) -> None:
        command = self.command()
        print("$", shlex.join(command).replace(EXECUTABLE, "rpt").replace(sys.executable, "python"), flush=True)
        if self._mark.exists():  # it was finished, and what it left is gone
            forget_time(self.name)
        start = time.monotonic()
        try:
            subprocess.run(command, check=True)
        finally:  # a part that was interrupted is part of the stage's time
            add_time(self.name, time.monotonic() - start)
        self._mark.parent.mkdir(parents=True, exist_ok=True)
        self._mark.touch()


def read_times() -> dict[str, float]:
    return json.loads(TIMES.read_text()) if TIMES.exists() else {}


def write_times(times: dict[str, float]) -> None:
    TIMES.parent.mkdir(parents=True, exist_ok=True)
    TIMES.write_text(json.dumps(times, indent=2) + "\n")


def add_time(name: str, seconds: float) -> None:
    times = read_times()
    write_times(times | {name: round(times.get(name, 0.0) + seconds, 1)})


def forget_time(name: str) -> None:
    times = read_times()
    if times.pop(name, None) is not None:
        write_times(times)


def time_table() -> str:
    """Minutes of each stage, the installation not counted."""
    times = read_times()
    rows = [f"  {stage.name:<26}{times[stage.name] / 60:6.1f} min" for stage in STAGES if stage.name in times]
    return "\n".join(["Time by stage:", *rows, f"  {'together':<26}{sum(times.values()) / 60:6.1f} min"])


def make_model() -> Stage:
    return Stage(
        name="model", command=lambda: (sys.executable, "scripts/make_model.py", "smollm2", "--output", str(MODEL)), output=MODEL, minutes=0.5
    )


def prepare() -> Stage:
    return Stage(
        name="prepare", command=lambda: (EXECUTABLE, "prepare", "--config", "configs/prepare/demo.yaml", *PREPARE_PRECISION), output=TASKS, minutes=2
    )


def fit(name: str, run: Path, config: str, minutes: float, options: tuple[str, ...] = ()) -> Stage:
    def command() -> tuple[str, ...]:
        # Stopped before its first checkpoint there is nothing to continue: it starts anew.
        return (EXECUTABLE, "fit", "--config", config, *PRECISION, *options, *(("--ckpt_path", "last") if checkpoints(run) else ()))

    max_steps = yaml.safe_load((ROOT / config).read_text())["trainer"]["max_steps"]
    return Stage(name=name, command=command, output=run / "checkpoints" / f"step-{max_steps:06d}.ckpt", minutes=minutes, run_folder=run)


def export(run: Path) -> Stage:
    output = run / "export"

    def command() -> tuple[str, ...]:
        shutil.rmtree(output, ignore_errors=True)
        return (EXECUTABLE, "export", "--ckpt", str(checkpoints(run)[-1]), "--output", str(output))

    return Stage(name=f"export {run.name}", command=command, output=output, minutes=0.5)


def evaluate(name: str, policy: Path, minutes: float) -> Stage:
    run = DEMO / name.replace(" ", "-")
    options = {
        "--model.policy.path": policy,
        "--trainer.default_root_dir": run,
        "--trainer.limit_val_batches": 1.0,
        "--rollout.thought_controls": True,
    }
    command = (
        EXECUTABLE,
        "validate",
        "--config",
        "configs/demo.yaml",
        *PRECISION,
        *ENGINE,
        *(str(part) for option in options.items() for part in option),
    )
    return Stage(name=f"evaluate {name}", command=lambda: command, output=results_of(name), minutes=minutes, feeds_later=False)


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*.ckpt"))


def results_of(name: str) -> Path:
    return DEMO / name.replace(" ", "-") / "validation" / "step-000000.jsonl"


EVALUATIONS = {"start": MODEL, "after cold start": COLD_START / "export", "after RPT": RPT / "export"}
STAGES = (
    make_model(),
    prepare(),
    evaluate("start", EVALUATIONS["start"], 3),
    fit("cold start", COLD_START, "configs/demo-cold-start.yaml", 9),
    export(COLD_START),
    evaluate("after cold start", EVALUATIONS["after cold start"], 2.5),
    fit("RPT", RPT, "configs/demo.yaml", 17, ENGINE),
    export(RPT),
    evaluate("after RPT", EVALUATIONS["after RPT"], 2.5),
)


def run_stages() -> None:
    if not HAS_VLLM:
        print(f"demo: there is no vLLM for {platform.system()}; transformers makes the rollouts, which takes longer than the times below")
    if IN_FP32:
        print("demo: this CPU has no instructions for bf16; everything is computed in fp32, which is faster here")
    start = time.monotonic()
    todo: list[Stage] = []
    for stage in STAGES:
        if any(earlier.feeds_later for earlier in todo):
            stage.forget()
        if not stage.is_finished:
            todo.append(stage)
    planned = 0.0  # minutes that the stages done in this call should have taken
    for number, stage in enumerate(STAGES, start=1):
        title = f"stage {number} of {len(STAGES)}: {stage.name}"
        if stage not in todo:
            print(f"=== {title}: finished before, skipped")
            continue
        elapsed = (time.monotonic() - start) / 60
        # What is planned for the rest, scaled by how much slower or faster than planned this machine was so far.
        left = sum(other.minutes for other in STAGES[number - 1 :] if other in todo) * (elapsed / planned if planned else 1)
        print(f"=== {title} | {elapsed:.0f} min elapsed, about {left:.0f} min left", flush=True)
        try:
            stage.run()
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"demo: {title} failed (exit status {error.returncode}, message above). `make demo` tries it again.") from error
        except KeyboardInterrupt:
            raise SystemExit(f"\ndemo: interrupted in {title}. `make demo` continues there.") from None
        planned += stage.minutes


def report() -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from rpt_lightning.evaluation.summary import summarise
    from rpt_lightning.evaluation.table import Stage as Column
    from rpt_lightning.metrics.results import read_results

    columns = [Column(name=name, results=read_results(results_of(name))) for name in EVALUATIONS]
    Console().print(Markdown(summarise(columns, RPT / "steps.jsonl", DEMO)))
    print(f"Table: {DEMO / 'summary.md'}   plot: {DEMO / 'summary.png'}   trained policy: {RPT / 'export'}")
    print(time_table())
    print(f"To start over: rm -r {DEMO} {TASKS}")


if __name__ == "__main__":
    run_stages()
    report()
