"""One seed of the testbed, as a list of stages.

The stages are the starting model, its tasks, RPT, and next-token training at RPT's FLOPs. `make demo` runs
seed 0. `make evidence` builds on the testbed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline import EXECUTABLE, Stage
from stages import HAS_VLLM, evaluate, export, fit, flags, report, settings

START_CONFIG = "configs/demo/start.yaml"
PREPARE_CONFIG = "configs/prepare/demo.yaml"
RPT_CONFIG = "configs/demo/rpt.yaml"
NTP_CONFIG = "configs/demo/ntp.yaml"
# The configurations use fp32, which suits so small a model on any machine. Only the engine depends on the
# system.
ENGINE = () if HAS_VLLM else ("--rollout.engine", "HFEngine", "--rollout.engine.dtype", "float32")


@dataclass(frozen=True, kw_only=True)
class Testbed:
    """The folders and stages of one seed."""

    seed: int
    folder: Path
    model: Path
    tasks: Path

    @classmethod
    def of(cls, seed: int) -> Testbed:
        """Return the testbed of a seed.

        Seed 0 belongs to the demo and uses the folders that its configurations name. Every other seed has its
        own folders.
        """
        suffix = "" if seed == 0 else f"-seed-{seed}"
        return cls(
            seed=seed,
            folder=Path(f"runs/demo{suffix}"),
            model=Path(f"models/cups{suffix}"),
            tasks=Path(f"tasks/demo{suffix}"),
        )

    @property
    def start(self) -> Path:
        return self.folder / "start"

    @property
    def start_model(self) -> Path:
        return self.start / "export"

    @property
    def before(self) -> Path:
        return self.folder / "before"

    @property
    def rpt(self) -> Path:
        return self.folder / "rpt"

    @property
    def ntp(self) -> Path:
        return self.folder / "ntp"

    def run_flags(self, run: Path, *, policy: Path | None = None) -> tuple[str, ...]:
        """Return the flags that a run of this seed adds to its configuration."""
        policy = policy or self.start_model
        own = {
            "--seed_everything": self.seed,
            "--trainer.default_root_dir": run,
            "--model.policy.path": policy,
            "--data.seed": self.seed,
        }
        return flags(own)

    def start_stages(self) -> tuple[Stage, ...]:
        """Build a model from scratch that can think but seldom does, and its tasks."""
        make = (
            sys.executable,
            "scripts/make_model.py",
            "world",
            "--world",
            "Cups",
            "--seed",
            str(self.seed),
            "--output",
            str(self.model),
        )
        # Each seed has its own games. Those of the starting model and of the tasks also have different seeds.
        games = flags({"--data.source.seed": 2 * self.seed + 1})
        prepare = {
            "--source.seed": 2 * self.seed + 2,
            "--output_dir": self.tasks,
            "--tokenizer": self.start_model,
            "--proxy": self.start_model,
        }
        prepare_command = (EXECUTABLE, "prepare", "--config", PREPARE_CONFIG, *flags(prepare))
        return (
            Stage(name="model", command=lambda: make, output=self.model, minutes=0.1, folder=self.folder),
            fit(
                "start model",
                self.start,
                START_CONFIG,
                folder=self.folder,
                minutes=3.5,
                options=(*self.run_flags(self.start, policy=self.model), *games),
            ),
            export(self.start, folder=self.folder),
            Stage(
                name="prepare",
                command=lambda: prepare_command,
                output=self.tasks,
                minutes=0.4,
                folder=self.folder,
            ),
        )

    def before_stage(self) -> Stage:
        """Evaluate the starting model at the held-out positions."""
        return evaluate(
            "evaluate before",
            self.start_model,
            self.before,
            RPT_CONFIG,
            folder=self.folder,
            minutes=0.5,
            options=(*ENGINE, *self.data_flags()),
        )

    def data_flags(self) -> tuple[str, ...]:
        return flags({"--data.task_dir": self.tasks, "--data.seed": self.seed})

    def rpt_stage(
        self, name: str = "RPT", run: Path | None = None, options: tuple[str, ...] = (), minutes: float = 2
    ) -> Stage:
        run = run or self.rpt
        own = (*ENGINE, *self.run_flags(run), "--data.task_dir", str(self.tasks), *options)
        return fit(name, run, RPT_CONFIG, folder=self.folder, minutes=minutes, options=own)

    def ntp_stages(self) -> tuple[Stage, ...]:
        """Train on next tokens for as many FLOPs as RPT used, rollouts included.

        Then evaluate at the same held-out positions.
        """
        own = (*self.run_flags(self.ntp), "--data.task_dir", str(self.tasks))
        validate = (
            EXECUTABLE,
            "validate",
            "--config",
            NTP_CONFIG,
            *own,
            "--trainer.limit_val_batches",
            "1.0",
            "--ckpt_path",
            "last",
        )
        return (
            fit(
                "continual NTP",
                self.ntp,
                NTP_CONFIG,
                folder=self.folder,
                minutes=1.2,
                options=own,
                budget_like=self.rpt,
            ),
            Stage(
                name="evaluate continual NTP",
                command=lambda: validate,
                output=self.ntp / "validation",
                minutes=0.3,
                folder=self.folder,
                feeds_later=False,
            ),
        )

    def report_stage(self) -> Stage:
        return report(
            self.rpt,
            (self.ntp,),
            self.folder / "report.html",
            before=self.before,
            after=None,
            folder=self.folder,
        )

    def stages(self) -> tuple[Stage, ...]:
        """Return all stages in order."""
        return (
            *self.start_stages(),
            self.before_stage(),
            self.rpt_stage(),
            *self.ntp_stages(),
            self.report_stage(),
        )

    @property
    def last_step(self) -> int:
        return int(settings(RPT_CONFIG)["trainer"]["max_steps"])
