"""`make demo`: text in, a policy trained by next-token reasoning out, then a table and a plot. Interrupted, it continues where it stopped.

Every stage is one command that a user could type; the demo only runs them in order and keeps the time.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

MODEL = Path("models/smollm2-135m")
TASKS = Path("tasks/demo")
DEMO = Path("runs/demo")
COLD_START = Path("runs/demo-cold-start")
RPT_RUN = Path("runs/demo-rpt")
RPT = str(Path(sys.executable).with_name("rpt"))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``output`` is what the command leaves behind, ``minutes`` about how long it takes on two cores. A fit continues from ``checkpoint``."""

    name: str
    command: tuple[str, ...]
    output: Path
    minutes: float
    checkpoint: Path | None = None

    @property
    def _mark(self) -> Path:
        return DEMO / "finished" / self.name.replace(" ", "-")

    @property
    def is_finished(self) -> bool:
        # A fit's output exists long before the fit is over, so that finishing leaves a mark of its own.
        return self._mark.exists() and self.output.exists()

    def run(self) -> None:
        resume = ("--ckpt_path", "last") if self.checkpoint and self.checkpoint.exists() else ()
        command = (*self.command, *resume)
        print(f"$ {shlex.join(command).replace(sys.executable, 'python').replace(RPT, 'rpt')}", flush=True)
        subprocess.run(command, check=True)
        self._mark.parent.mkdir(parents=True, exist_ok=True)
        self._mark.touch()


def validate(name: str, policy: Path, minutes: float, *options: str) -> Stage:
    results = results_of(name)
    command = (RPT, "validate", "--config", "configs/demo.yaml", "--model.policy.path", str(policy), "--model.results_path", str(results), *options)
    return Stage(name=f"evaluate {name}", command=command, output=results.with_suffix(".json"), minutes=minutes)


def fit(name: str, run: Path, config: str, minutes: float, *options: str) -> Stage:
    checkpoint = run / "checkpoints" / "last.ckpt"
    return Stage(name=name, command=(RPT, "fit", "--config", config, *options), output=checkpoint, minutes=minutes, checkpoint=checkpoint)


def export(run: Path) -> Stage:
    command = (RPT, "export", "--ckpt", str(run / "checkpoints" / "last.ckpt"), "--output", str(run / "hf"))
    return Stage(name=f"export {run.name}", command=command, output=run / "hf", minutes=0.5)


def results_of(name: str) -> Path:
    return DEMO / f"{name.replace(' ', '-')}.jsonl"


STAGES = (
    Stage(name="model", command=(sys.executable, "scripts/make_model.py", "smollm2", "--output", str(MODEL)), output=MODEL, minutes=0.5),
    Stage(name="prepare", command=(RPT, "prepare", "--config", "configs/prepare/demo.yaml"), output=TASKS / "manifest.json", minutes=10),
    validate("start", MODEL, 4),
    fit("cold start", COLD_START, "configs/demo-cold-start.yaml", 14),
    export(COLD_START),
    validate("after cold start", COLD_START / "hf", 4),
    fit("RPT", RPT_RUN, "configs/demo.yaml", 18, "--model.policy.path", str(COLD_START / "hf")),
    export(RPT_RUN),
    validate("after RPT", RPT_RUN / "hf", 6, "--model.thought_controls", "true"),
)


def run_stages() -> None:
    start = time.monotonic()
    todo = [stage for stage in STAGES if not stage.is_finished]
    planned = 0.0  # minutes that the stages of this call should have taken so far
    for number, stage in enumerate(STAGES, start=1):
        title = f"stage {number} of {len(STAGES)}: {stage.name}"
        if stage not in todo:
            print(f"=== {title}: finished before, skipped")
            continue
        elapsed = (time.monotonic() - start) / 60
        # What is planned for the rest, scaled by how much slower or faster than planned this machine was so far.
        left = sum(other.minutes for other in STAGES[number - 1 :] if other in todo) * (elapsed / planned if planned else 1)
        print(f"=== {title} | elapsed {elapsed:.0f} min, about {left:.0f} min left", flush=True)
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

    from rpt_lightning.evaluation.results import read_results
    from rpt_lightning.evaluation.summary import summarise
    from rpt_lightning.evaluation.table import Stage as Column

    columns = [Column(name=name, results=read_results(results_of(name))) for name in ("start", "after cold start", "after RPT")]
    Console().print(Markdown(summarise(columns, RPT_RUN / "log.jsonl", DEMO)))
    print(f"Table: {DEMO / 'summary.md'}   plot: {DEMO / 'summary.png'}   trained policy: {RPT_RUN / 'hf'}")
    print(f"To start over: rm -r {DEMO} {COLD_START} {RPT_RUN} {TASKS}")


if __name__ == "__main__":
    run_stages()
    report()
