"""Objectives that ask for something other than the next token, each in a world and in one without a solution.

`python scripts/evidence.py answers` runs the cases. Each objective has a starting model of its own, which
answers as the objective asks but seldom thinks. RPT then trains it on tasks of the world, and the record
says how many held-out positions were right before and after, with and without a thought.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evidence_cases import CASES, FAMILIES, Case, Family
from evidence_records import replace_text
from pipeline import EXECUTABLE, commit
from stages import checkpoint, flags
from testbed import ENGINE, PREPARE_CONFIG, RPT_CONFIG, START_CONFIG

from rpt_lightning.evaluation.paired_bootstrap import paired_bootstrap
from rpt_lightning.evaluation.tables.stages import Rate, interval_text, markdown_row, markdown_table
from rpt_lightning.records.results import PositionResult, read_results

RECORDS = Path("docs/evidence")
SECTION = "objectives with answers of their own"
LAST_STEP, STEPS = 380, 20
STAGES = ("before", "after")


@dataclass(frozen=True, kw_only=True)
class CaseRecord:
    """One case of one seed.

    ``groups`` names the kind of each held-out position. ``right`` has a string of 0 and 1 with one character
    per position, for "before" and "after" and for each with and without a thought. ``lengths`` are the mean
    tokens of the greedy completions before and after.
    """

    groups: tuple[str, ...]
    right: dict[str, str]
    lengths: dict[str, float]
    about: dict[str, Any]

    def rate(self, question: str, group: str) -> Rate:
        return Rate.of([mark == "1" for mark in self._of(question, group)])

    def _of(self, question: str, group: str) -> str:
        return "".join(
            mark for mark, name in zip(self.right[question], self.groups, strict=True) if name == group
        )

    def gain(self, group: str) -> tuple[list[bool], list[bool]]:
        """Outcomes with reasoning, before and after, at the positions of a group."""
        before, after = (self._of(f"{stage}, reasoning", group) for stage in STAGES)
        return [mark == "1" for mark in before], [mark == "1" for mark in after]


def record_path(seed: int) -> Path:
    return RECORDS / f"answers-{seed}.json"


def read_cases(path: Path) -> dict[str, CaseRecord]:
    if not path.exists():
        return {}
    return {
        name: CaseRecord(**{**case, "groups": tuple(case["groups"])})
        for name, case in json.loads(path.read_text()).items()
    }


def write_case(path: Path, name: str, record: CaseRecord) -> None:
    """Add a case to a seed's file. The replacement is atomic, so the file is always complete."""
    cases = {**read_cases(path), name: record}
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(asdict(cases[case]))}" for case in sorted(cases))
    replace_text(path, f"{{\n{lines}\n}}\n")


def group_of(position: PositionResult) -> str:
    """Name the kind of a position, by the fields of its mark."""
    fields = position.fields or {}
    if "place" not in fields:
        return "all"
    return f"{fields['place']}, {'told' if int(fields['told']) else 'untold'}"


def measure_case(before: Path, after: Path, *, about: dict[str, Any]) -> CaseRecord:
    """Make a record from two validations of the same positions."""
    stages = {}
    for stage, path in (("before", before), ("after", after)):
        stages[stage] = sorted(read_results(path).positions, key=lambda position: position.task_id)
    ids = {stage: [position.task_id for position in positions] for stage, positions in stages.items()}
    assert ids["before"] == ids["after"], "the validations are at different positions"
    right, lengths = {}, {}
    for stage, positions in stages.items():
        for question, name in (("reasoning", "reasoning_correct"), ("at once", "ntp_correct")):
            right[f"{stage}, {question}"] = "".join(str(int(getattr(one, name))) for one in positions)
        tokens = [one.length for one in positions if one.length is not None]
        lengths[stage] = round(sum(tokens) / len(tokens), 2)
    groups = tuple(group_of(position) for position in stages["after"])
    return CaseRecord(groups=groups, right=right, lengths=lengths, about=about)


class AnswerSeed:
    """The folders and commands of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.folder = Path("runs/evidence") / f"answers-{seed}"
        self.record = record_path(seed)

    def start_commands(self, family: Family) -> list[tuple[str, ...]]:
        """Train a family's starting model on worked examples from scratch."""
        model, run = self.folder / f"model-{family.name}", self.folder / f"start-{family.name}"
        make = {"--world": family.world, "--seed": self.seed, "--output": model}
        own: dict[str, object] = {
            "--seed_everything": self.seed,
            "--trainer.default_root_dir": run,
            "--model.policy.path": model,
            "--data.seed": self.seed,
        }
        own |= family.examples | _of_world(family.examples, "--data.source", 60_000, 2 * self.seed + 1)
        return [
            (sys.executable, "scripts/make_model.py", "world", *flags(make)),
            (EXECUTABLE, "fit", "--config", START_CONFIG, *flags(own), "--ckpt_path", "auto"),
            (
                EXECUTABLE,
                *("export", "--ckpt", str(checkpoint(run, LAST_STEP)), "--output", str(self.start(family))),
            ),
        ]

    def start(self, family: Family) -> Path:
        return self.folder / f"start-{family.name}" / "export"

    def case_commands(self, case: Case, family: Family) -> list[tuple[str, ...]]:
        """Prepare tasks, measure the starting model, and train it by RPT."""
        tasks = Path("tasks") / f"evidence-answers-{self.seed}-{case.name}"
        run, start = self.run(case), self.start(family)
        source = family.prepare | _of_world(family.prepare, "--source", 6_000, 2 * self.seed + 2)
        inner = "--source.source." if "--source.source" in family.prepare else "--source."
        prepare = {"--output_dir": tasks, "--tokenizer": start, "--proxy": start} | source
        prepare |= {f"{inner}{name}": value for name, value in case.tasks.items()}
        prepare |= {"--objective": family.objective}
        prepare |= {f"--objective.{name}": value for name, value in family.options.items()}
        prepare |= {"--entropy_threshold": -1, "--heldout_entropy_threshold": -1}
        if family.name == "masked-span":  # the moves can be found out, so only the cups are asked for
            prepare |= {"--entropy_threshold": 1.5, "--heldout_entropy_threshold": 1.5}
        own: dict[str, object] = {
            "--seed_everything": self.seed,
            "--model.policy.path": start,
            "--data.task_dir": tasks,
            "--data.seed": self.seed,
            "--data.eval_min_entropy": -1,
            "--data.tasks_per_step": 32,
            "--rollout.evaluation.thought_controls": False,
            "--rollout.objective": family.objective,
        }
        own |= {f"--rollout.objective.{name}": value for name, value in family.prompt.items()}
        own |= {f"--rollout.objective.{name}": value for name, value in family.options.items()}
        own |= family.run
        rpt = (*ENGINE, *flags(own))
        validate = {"--trainer.default_root_dir": f"{run}-before", "--trainer.limit_val_batches": 1.0}
        fit = {
            "--trainer.default_root_dir": run,
            "--trainer.max_steps": STEPS,
            "--trainer.val_check_interval": STEPS,
        }
        return [
            (EXECUTABLE, "prepare", "--config", PREPARE_CONFIG, *flags(prepare)),
            (EXECUTABLE, "validate", "--config", RPT_CONFIG, *rpt, *flags(validate)),
            (EXECUTABLE, "fit", "--config", RPT_CONFIG, *rpt, *flags(fit), "--ckpt_path", "auto"),
        ]

    def run(self, case: Case) -> Path:
        return self.folder / case.name

    def run_all(self, names: Sequence[str]) -> None:
        """Run the cases that have no record yet."""
        for family in FAMILIES:
            done = read_cases(self.record)
            cases = [
                case
                for case in CASES
                if case.family == family.name and case.name not in done and (not names or case.name in names)
            ]
            if cases and not self.start(family).exists():
                self._run(f"start-{family.name}", self.start_commands(family))
            for case in cases:
                begin, commands = time.monotonic(), self.case_commands(case, family)
                self._run(case.name, commands)
                about = {
                    "commands": [_shown(command) for command in (*self.start_commands(family), *commands)],
                    "commit": commit(),
                    "seconds": round(time.monotonic() - begin),
                }
                record = measure_case(
                    Path(f"{self.run(case)}-before") / "validation" / "step-000000.jsonl",
                    self.run(case) / "validation" / f"step-{STEPS:06d}.jsonl",
                    about=about,
                )
                write_case(self.record, case.name, record)
                for group in case.groups:
                    rates = [record.rate(f"{stage}, reasoning", group) for stage in ("before", "after")]
                    print(
                        f"evidence: seed {self.seed}, {case.name}, {group}: {rates[0]} -> {rates[1]}",
                        flush=True,
                    )

    def _run(self, name: str, commands: Sequence[tuple[str, ...]]) -> None:
        """Run commands, with their output in a log file."""
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            for command in commands:
                print("$", _shown(command), file=file, flush=True)
                if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode:
                    raise SystemExit(
                        f"evidence: seed {self.seed}, {name} failed. The reason is at the end of {log}. "
                        "`python scripts/evidence.py answers` tries it again"
                    )


def _of_world(options: dict[str, object], flag: str, num_documents: int, seed: int) -> dict[str, object]:
    """Number of documents and seed of the world, which may lie inside another source."""
    inner = f"{flag}.source." if f"{flag}.source" in options else f"{flag}."
    return {f"{inner}num_documents": num_documents, f"{inner}seed": seed}


def _shown(command: tuple[str, ...]) -> str:
    return shlex.join(command).replace(EXECUTABLE, "rpt").replace(sys.executable, "python")


def answers_table() -> str:
    """Tabulate every case: what we expected, and accuracy before and after, with a thought and without."""
    paths = sorted(RECORDS.glob("answers-*.json"))
    records = {int(path.stem.removeprefix("answers-")): read_cases(path) for path in paths}
    rows = []
    for case in CASES:
        found = {seed: cases[case.name] for seed, cases in records.items() if case.name in cases}
        if not found:
            continue
        for group, expected in case.groups.items():
            before, after, units = [], [], []
            for seed, record in found.items():
                one, other = record.gain(group)
                before += one
                after += other
                units += [f"{seed}:{number}" for number in range(len(one))]
            gain = paired_bootstrap(before, after, units=units)
            lengths = [
                sum(record.lengths[stage] for record in found.values()) / len(found) for stage in STAGES
            ]
            cells = [
                expected,
                ", ".join(
                    f"{100 * one.rate('after, reasoning', group).mean:.1f} %" for one in found.values()
                ),
                *(
                    _pooled(found, question, group)
                    for question in ("before, reasoning", "after, reasoning", "after, at once")
                ),
                f"{100 * gain.difference:+.1f} {interval_text(gain.low, gain.high)}",
                f"{lengths[0]:.0f} -> {lengths[1]:.0f}",
            ]
            name = case.what if group == "all" else f"{case.what}: {group}"
            rows.append(markdown_row(f"**{case.name}**: {name}", cells))
    columns = [
        "expected",
        "each seed",
        "before, with reasoning",
        "after, with reasoning",
        "after, at once",
        "after - before (points)",
        "length",
    ]
    return markdown_table(SECTION, columns, rows)


def _pooled(found: dict[int, CaseRecord], question: str, group: str) -> Rate:
    rates = [record.rate(question, group) for record in found.values()]
    return Rate(sum(rate.successes for rate in rates), sum(rate.count for rate in rates))
