"""`make reproduction` as a user runs it, in a copy of the project with the tiny model and little to do.

The docs show what the records say.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rpt_lightning.evaluation.reproduction.record import read_record
from rpt_lightning.evaluation.reproduction.summary import BEGIN, END, replace_section, seed_summary
from rpt_lightning.evaluation.run_reader import read_run
from rpt_lightning.evaluation.scaling.figure import scaling_curves
from rpt_lightning.records.results import read_results

ROOT = Path(__file__).resolve().parents[1]
NUM_POSITIONS = 12
# Steps of RPT, and of the checkpoints between.
LAST_STEP, EVERY = 4, 1


@pytest.fixture
def project(tiny_model_dir, tiny_task_dir, tmp_path):
    """The project's scripts, and its configurations made small. Model and tasks are already there."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for folder, source in (("models/smollm2-135m", tiny_model_dir), ("tasks/demo-text", tiny_task_dir)):
        (tmp_path / folder).parent.mkdir(parents=True)
        (tmp_path / folder).symlink_to(source)
    marks = tmp_path / "runs/demo-text/finished"
    marks.mkdir(parents=True)
    for stage in ("model", "prepare"):
        (marks / stage).touch()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text(f"# Results\n{BEGIN}\n{END}\nAfter it.\n")
    (tmp_path / "configs").mkdir()
    for name in ("demo-text", "demo-text-cold-start", "ntp-baseline"):
        config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
        make_small(config)
        (tmp_path / f"configs/{name}.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def make_small(config):
    config["trainer"]["max_steps"] = LAST_STEP
    if "val_check_interval" in config["trainer"]:
        config["trainer"]["val_check_interval"] = LAST_STEP
    data = config["data"]["init_args"]
    data |= {name: value for name, value in SMALL_DATA.items() if name in data}
    if "rollout" in config:
        config["rollout"] |= {
            "group_size": 4,
            "max_prompt_tokens": 100,
            "sampling": {"temperature": 1.0, "max_completion_tokens": 6},
        }
        config["rollout"]["engine"] = {"class_path": "HFEngine", "init_args": {"dtype": "float32"}}
        config["checkpoint"] = {"every_n_steps": EVERY, "keep_every_n_steps": EVERY}


SMALL_DATA = {
    "tasks_per_step": 4,
    "num_eval_tasks": NUM_POSITIONS,
    "eval_batch_size": 12,
    "traces_per_step": 8,
    "documents_per_step": 1,
}


def reproduction(project, *arguments):
    done = subprocess.run(
        [sys.executable, "scripts/reproduction.py", *arguments],
        cwd=project,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout + done.stderr


def test_a_seed_of_another_cold_start_is_not_gone_on_with(project):
    start = project / "runs/demo-text/cold-start/export"
    start.mkdir(parents=True)
    (start / "model.safetensors").write_bytes(b"these weights")
    seed = project / "runs/reproduction/seed-1"
    seed.mkdir(parents=True)
    (seed / "start.sha256").write_text(hashlib.sha256(b"those weights").hexdigest())
    status, output = reproduction(project, "run", "--seed", "1")
    assert status == 1
    assert (
        "runs/reproduction/seed-1 was trained from another cold start than the one in "
        "runs/demo-text/cold-start/export" in output
    )


@pytest.mark.long
def test_two_seeds_from_nothing_to_the_summary(project):
    status, output = reproduction(project, "run", "--seed", "1")
    assert status == 0, output
    record = read_record(project / "docs/reproduction/seed-1.json")
    assert [(one.policy, one.step) for one in record.measured][:-1] == [
        ("start", 0),
        ("cold start", 0),
        ("RPT", 1),
        ("RPT", 2),
        ("RPT", 3),
        ("RPT", 4),
    ]

    rpt, baseline = (read_run(project / "runs/reproduction/seed-1" / name) for name in ("rpt", "ntp"))
    costs = [sum(step["cost/flops"] for step in run.steps.values()) for run in (rpt, baseline)]
    last = list(baseline.steps.values())[-1]["cost/flops"]
    assert costs[0] <= costs[1] < costs[0] + last
    assert [one.flops for one in (record.last("RPT"), record.last("continual NTP"))] == pytest.approx(costs)
    # Every policy, the baseline included, answered the same positions. The record repeats what each
    # validation said.
    file = project / "runs/reproduction/seed-1/after-RPT/validation/step-000000.jsonl"
    for one, path in (
        (record.last("RPT"), file),
        (
            record.last("continual NTP"),
            next((project / "runs/reproduction/seed-1/ntp/validation").glob("*.jsonl")),
        ),
    ):
        truth = read_results(path).positions
        assert len(truth) == NUM_POSITIONS
        assert [(p.task_id, p.reasoning_correct, p.ntp_correct) for p in one.results.positions] == [
            (p.task_id, p.reasoning_correct, p.ntp_correct) for p in truth
        ]
    # rpt scaling, of the run's folder, has the record's points.
    assert [curve.compute for curve in scaling_curves(rpt)] == [
        curve.compute for curve in scaling_curves(record.as_run())
    ]

    # Seed 0 takes over what the demo makes, here the cold start. A finished seed has nothing left to do.
    status, output = reproduction(project, "run", "--seed", "0")
    assert status == 0, output
    assert "cold start: finished before, skipped" in output
    assert (project / "runs/demo-text/rpt/checkpoints/step-000004.ckpt").is_file()
    status, output = reproduction(project, "run", "--seed", "0")
    assert status == 0, output
    assert output.count("finished before, skipped") == 14
    assert "stage 15 of 15: report |" in output
    assert (project / "runs/reproduction/seed-0/report.html").stat().st_size > 100_000
    text = (project / "docs/results.md").read_text()
    assert f"2 seeds, {NUM_POSITIONS} held-out positions" in text
    assert text.endswith(f"{END}\nAfter it.\n")
    # Another arm has folders and a record of its own, starts from the same cold start, and no scaling fit.
    status, output = reproduction(project, "run", "--seed", "0", "--arm", "trunk")
    assert status == 0, output
    assert "cold start: finished before, skipped" in output
    trunk = read_record(project / "docs/reproduction/trunk-0.json")
    assert trunk.about["arm"]["options"]["--model.ntp_weight"] == 0.3
    assert [(one.policy, one.step) for one in trunk.measured][:-1] == [
        ("start", 0),
        ("cold start", 0),
        ("RPT", 4),
    ]
    assert all(
        "loss/ntp" in step for step in read_run(project / "runs/reproduction/trunk-0/rpt").steps.values()
    )
    assert "2 seeds" in (project / "docs/results.md").read_text()
    histories = json.loads((project / "docs/reproduction/seed-0.json").read_text())["stages"]
    assert all(history["seconds"] > 0 and history["command"].startswith("rpt ") for history in histories)


@pytest.mark.parametrize(
    ("page", "records"), [("results.md", "seed-*.json"), ("trunk.md", "trunk-[0-9]*.json")]
)
def test_the_page_shows_what_the_records_say(page, records):
    found = [read_record(path) for path in sorted((ROOT / "docs/reproduction").glob(records))]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert replace_section(text, seed_summary(found), where=page) == text
