"""`make evidence`: run every arm of scripts/evidence_arms.py on the testbed and write the page of results.

Each arm runs with three seeds.

    # Run the arms that have no record yet, then write the page.
    python scripts/evidence.py run [--seeds 0 1 2] [--jobs 2] [--arms NAME ...]
    # Run the objectives with answers of their own that have no record yet, then write the page.
    python scripts/evidence.py answers [--seeds 0 1 2] [--cases NAME ...]
    # Run the scaling curves that have no record yet, then write the page.
    python scripts/evidence.py scaling [--seeds 0 1 2] [--jobs 2]
    # Write the tables and figures of docs/evidence.md from the records.
    python scripts/evidence.py page

An arm is a few commands that a user could type. Its record lists them. An interrupted run resumes from its
last checkpoint. Two arms run side by side, with one thread each.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from evidence_answers import AnswerSeed
from evidence_arms import ARMS, BRANCH_STEP, LAST_STEP, STARTS, STEPS, TASKS_PER_STEP, Arm, Start
from evidence_cases import CASES
from evidence_records import measure, read_records, write_record
from evidence_scaling import (
    EVERY,
    FIRST_EVERY,
    FIRST_STEPS,
    RPT_SETTINGS,
    START_STEPS,
    measure_curve,
    write_curve,
)
from evidence_scaling import LAST_STEP as LAST_CURVE_STEP
from pipeline import EXECUTABLE, commit, run_stages
from stages import checkpoint, flags
from testbed import ENGINE, NTP_CONFIG, PREPARE_CONFIG, RPT_CONFIG, START_CONFIG, Testbed

RECORDS = Path("docs/evidence")
SEEDS = (0, 1, 2)
TASKS: dict[str, dict[str, object]] = {
    "short": {"--source.max_depth": 6},
    "noise-50": {"--source.noise": 0.5},
    "noise-90": {"--source.noise": 0.9, "--source.num_documents": 12_000},
}
MAX_RIVAL_STEPS = 100_000
_lock = threading.Lock()


class Seed:
    """The folders and commands of one seed."""

    def __init__(self, seed: int) -> None:
        self.testbed = Testbed.of(seed)
        self.folder = Path("runs/evidence") / f"seed-{seed}"
        self.record = RECORDS / f"seed-{seed}.json"
        self.curve = RECORDS / f"scaling-{seed}.json"

    def arms_to_run(self, names: list[str]) -> list[Arm]:
        """Select the arms that have no record yet, from all arms or from the named ones.

        The base arm comes first. It runs again if a rival needs its run and this clone does not have it.
        """
        records = read_records(self.record)
        arms = [
            arm
            for arm in ARMS
            if arm.name not in records and (not names or arm.name in names or arm.name == "base")
        ]
        needs_run = (
            any(arm.kind != "rpt" for arm in arms) and not (self.folder / "base" / "steps.jsonl").exists()
        )
        return [ARMS[0], *arms] if needs_run and ARMS[0] not in arms else arms

    def make_base(self) -> None:
        """Make the demo's starting model and tasks, or reuse them if the demo has already run."""
        stages = (*self.testbed.start_stages(), self.testbed.before_stage())
        run_stages(stages, program="evidence", again="make evidence")

    def start_model(self, name: str) -> Path:
        return self.testbed.start_model if name == "base" else self.folder / f"start-{name}" / "export"

    def tasks(self, name: str) -> Path:
        return (
            self.testbed.tasks if name == "base" else Path(f"tasks/evidence-seed-{self.testbed.seed}-{name}")
        )

    def make_start(self, start: Start) -> None:
        """Train another starting model.

        It branches off the base start after the first phases if its curriculum is the same up to that point.
        """
        run = self.folder / f"start-{start.name}"
        if (run / "export").exists():
            return
        shared = checkpoint(self.testbed.start, BRANCH_STEP)
        begun = any((run / "checkpoints").glob("step-*.ckpt"))
        resume = (
            ("--ckpt_path", "last") if begun else (("--ckpt_path", str(shared)) if start.branches else ())
        )
        own = self.testbed.run_flags(run, policy=self.testbed.model)
        games = flags(
            {"--data.source.seed": 2 * self.testbed.seed + 1, "--data.phases": f"[{', '.join(start.phases)}]"}
        )
        self._run(start.name, (EXECUTABLE, "fit", "--config", START_CONFIG, *own, *games, *resume))
        self._run(start.name, _export(checkpoint(run, LAST_STEP), run / "export"))

    def make_tasks(self, name: str) -> None:
        own: dict[str, object] = {
            "--source.seed": 2 * self.testbed.seed + 2,
            "--output_dir": self.tasks(name),
        }
        own |= {"--tokenizer": self.testbed.start_model, "--proxy": self.testbed.start_model} | TASKS[name]
        self._run(f"prepare-{name}", (EXECUTABLE, "prepare", "--config", PREPARE_CONFIG, *flags(own)))

    def run_arm(self, arm: Arm) -> None:
        """Train an arm, validate it at the base's held-out positions, and write its record."""
        begin, run = time.monotonic(), self.folder / arm.name
        commands = {"rpt": self._rpt, "ntp": self._ntp, "sft": self._sft}[arm.kind](arm, run)
        for command in commands:
            self._run(arm.name, command)
        about = _about(commands, begin)
        with _lock:
            write_record(self.record, arm.name, measure(run, about=about))
        print(
            f"evidence: seed {self.testbed.seed}, {arm.name}: "
            f"{read_records(self.record)[arm.name].headline}, {about['seconds']} s",
            flush=True,
        )

    def run_curve(self) -> None:
        """Run one scaling curve and write its record.

        The starting model always thinks but makes mistakes. RPT then validates at roughly logarithmic steps.
        """
        begin, start, run = time.monotonic(), self.folder / "start-scaling", self.folder / "scaling"
        games = flags(
            {
                "--data.source.seed": 2 * self.testbed.seed + 1,
                "--trainer.max_steps": START_STEPS,
                "--checkpoint.keep_every_n_steps": "null",
            }
        )
        teach = _fit(START_CONFIG, *self.testbed.run_flags(start, policy=self.testbed.model), *games)
        export = _export(checkpoint(start, START_STEPS), start / "export")
        own = (
            *ENGINE,
            *self.testbed.run_flags(run, policy=start / "export"),
            "--data.task_dir",
            str(self.testbed.tasks),
            *flags(RPT_SETTINGS),
        )
        parts = [
            _fit(
                RPT_CONFIG,
                *own,
                *flags(
                    {
                        "--trainer.max_steps": last,
                        "--trainer.val_check_interval": every,
                        "--checkpoint.every_n_steps": saves,
                    }
                ),
            )
            for last, every, saves in (
                (FIRST_STEPS, FIRST_EVERY, FIRST_STEPS),
                (LAST_CURVE_STEP, EVERY, 5 * EVERY),
            )
        ]
        for command in (*([] if (start / "export").exists() else [teach, export]), *parts):
            self._run("scaling", command)
        about = _about([teach, export, *parts], begin)
        write_curve(self.curve, measure_curve(run, about=about))
        print(f"evidence: seed {self.testbed.seed}, scaling: {about['seconds']} s", flush=True)

    def _rpt(self, arm: Arm, run: Path) -> list[tuple[str, ...]]:
        own = self.testbed.run_flags(run, policy=self.start_model(arm.start))
        # The fit itself validates at its last step, except on other tasks: their held-out positions differ.
        validates = arm.tasks == "base"
        steps: dict[str, object] = {
            "--trainer.max_steps": STEPS,
            "--trainer.val_check_interval": STEPS,
            "--checkpoint.every_n_steps": STEPS,
        }
        # Everything else is as in the demo, which has the same number of steps.
        steps |= {"--data.tasks_per_step": TASKS_PER_STEP}
        steps |= {} if validates else {"--trainer.limit_val_batches": 0}
        # The page shows thought controls for the base arm only.
        steps |= {} if arm.name == "base" else {"--rollout.evaluation.thought_controls": False}
        tasks = str(self.tasks(arm.tasks))
        fit = _fit(RPT_CONFIG, *ENGINE, *own, "--data.task_dir", tasks, *flags(steps), *arm.options)
        return (
            [fit]
            if validates
            else [fit, self._validate(run, self.start_model(arm.start), checkpoint(run, STEPS))]
        )

    def _ntp(self, arm: Arm, run: Path) -> list[tuple[str, ...]]:
        own = (*self.testbed.run_flags(run), "--data.task_dir", str(self.testbed.tasks))
        fit = _fit(NTP_CONFIG, *own, *self._budget())
        return [fit, self._validate(run, self.testbed.start_model, "last")]

    def _sft(self, arm: Arm, run: Path) -> list[tuple[str, ...]]:
        """Build supervised training on the games that RPT's tasks come from."""
        games: dict[str, object] = {
            "--data.source.seed": 2 * self.testbed.seed + 2,
            "--data.source.num_documents": 6000,
        }
        games |= {
            "--data.phases": "[{p_cot: 1.0, text: false}]",
            "--model.optimizer.lr": 3e-4,
            "--model.lr_scheduler": "null",
        }
        own = self.testbed.run_flags(run)
        fit = _fit(START_CONFIG, *own, *flags(games), *self._budget())
        return [fit, self._validate(run, self.testbed.start_model, "last")]

    def _budget(self) -> tuple[str, ...]:
        """Flags that end a rival's run at the FLOPs of the base arm."""
        like = {"--budget.like": self.folder / "base", "--budget.by": "flops"}
        return flags(like | {"--trainer.max_steps": MAX_RIVAL_STEPS})

    def _validate(self, run: Path, policy: Path, ckpt: Path | str) -> tuple[str, ...]:
        own = (*self.testbed.run_flags(run, policy=policy), "--data.task_dir", str(self.testbed.tasks))
        rest = flags(
            {
                "--trainer.limit_val_batches": 1.0,
                "--rollout.evaluation.thought_controls": False,
                "--ckpt_path": ckpt,
            }
        )
        return (EXECUTABLE, "validate", "--config", RPT_CONFIG, *ENGINE, *own, *rest)

    def _run(self, name: str, command: tuple[str, ...]) -> None:
        """Run a command and append its output to a log file named after the arm."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            print("$", _shown(command), file=file, flush=True)
            if subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            ).returncode:
                raise SystemExit(
                    f"evidence: seed {self.testbed.seed}, {name} failed. The reason is at the end of {log}. "
                    f"`make evidence` tries it again"
                )


def _fit(config: str, *options: str) -> tuple[str, ...]:
    """Build a fit that resumes where it was interrupted."""
    return (EXECUTABLE, "fit", "--config", config, *options, "--ckpt_path", "auto")


def _export(ckpt: Path, output: Path) -> tuple[str, ...]:
    return (EXECUTABLE, "export", "--ckpt", str(ckpt), "--output", str(output))


def _about(commands: Sequence[tuple[str, ...]], begin: float) -> dict[str, Any]:
    """How a record came about. ``begin`` is on the clock of time.monotonic."""
    return {
        "commands": [_shown(command) for command in commands],
        "commit": commit(),
        "seconds": round(time.monotonic() - begin),
    }


def _shown(command: tuple[str, ...]) -> str:
    return shlex.join(command).replace(EXECUTABLE, "rpt").replace(sys.executable, "python")


def run(seeds: list[int], jobs: int, names: list[str]) -> None:
    """Run one seed after another, so that an interruption leaves complete seeds.

    The base arm runs before its rivals because it sets their budget.
    """
    for seed in map(Seed, seeds):
        arms = seed.arms_to_run(names)
        if not arms:
            continue  # no arm needs this seed's starting models
        starts = [start for start in STARTS if start.name in {arm.start for arm in arms} - {"base"}]
        tasks = [name for name in TASKS if name in {arm.tasks for arm in arms}]
        seed.make_base()
        if arms[0].name == "base":
            seed.run_arm(arms.pop(0))
        # Arms that need only the base run first, alongside the starting models and tasks of the other arms.
        ready = [arm for arm in arms if arm.start == arm.tasks == "base"]
        waiting = [arm for arm in arms if arm not in ready]
        first: list[Callable[[], None]] = [partial(seed.make_start, start) for start in starts]
        first += [partial(seed.make_tasks, name) for name in tasks]
        for work in (
            first + [partial(seed.run_arm, arm) for arm in ready],
            [partial(seed.run_arm, arm) for arm in waiting],
        ):
            with ThreadPoolExecutor(jobs) as pool:
                for result in [pool.submit(one) for one in work]:
                    result.result()


def run_curves(seeds: list[int], jobs: int) -> None:
    """Run the scaling curves that have no record, side by side."""
    wanted = [seed for seed in map(Seed, seeds) if not seed.curve.exists()]
    for seed in wanted:
        seed.make_base()
    with ThreadPoolExecutor(jobs) as pool:
        for result in [pool.submit(seed.run_curve) for seed in wanted]:
            result.result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run_parser = verbs.add_parser("run", help="run the arms that have no record yet")
    answers_parser = verbs.add_parser("answers", help="run the objectives with answers of their own")
    answers_parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    answers_parser.add_argument(
        "--cases", nargs="+", default=[], choices=[case.name for case in CASES], help="run only these cases"
    )
    for runs in (run_parser, verbs.add_parser("scaling", help="run the scaling curves without a record")):
        runs.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
        runs.add_argument("--jobs", type=int, default=2, help="number of runs side by side, one thread each")
    run_parser.add_argument("--arms", nargs="+", default=[], help="run only these arms and the base arm")
    verbs.add_parser("page", help="write the tables and figures of docs/evidence.md")
    arguments = parser.parse_args()
    if arguments.verb == "run":
        run(arguments.seeds, arguments.jobs, arguments.arms)
    elif arguments.verb == "answers":
        for seed in arguments.seeds:
            AnswerSeed(seed).run_all(arguments.cases)
    elif arguments.verb == "scaling":
        run_curves(arguments.seeds, arguments.jobs)
    from evidence_page import write_page

    write_page()


if __name__ == "__main__":
    main()
