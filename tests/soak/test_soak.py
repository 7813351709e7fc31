"""The short form of the soak, and tests of its parts. A check that cannot fail proves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from checks import check_memory, check_steps, check_tasks
from memory import Growth, growth_of
from recorded_servers import read_recordings
from schedule import SERVER_FAULTS, TRAINER_FAULTS, make_schedule

from rpt_lightning.data.modules.token_tasks import TokenTaskDataModule


@pytest.mark.long
def test_three_minutes_with_stand_in_servers(tmp_path):
    """Run every part of the real soak except vLLM itself, with a fault every 20 seconds."""
    script = Path(__file__).with_name("soak.py")
    command = [
        sys.executable,
        script,
        "--minutes",
        "3",
        "--every_s",
        "20",
        "--servers",
        "stand-in",
        "--folder",
        tmp_path / "soak",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert set(record["checks"].values()) == {"ok"}
    assert sum("not made" not in fault["outcome"] for fault in record["faults"]) >= 4


def test_a_schedule_is_that_of_its_seed():
    half_an_hour = {"duration_s": 1800.0, "every_s": 60.0}
    faults = make_schedule(seed=3, **half_an_hour)
    assert faults == make_schedule(seed=3, **half_an_hour) != make_schedule(seed=4, **half_an_hour)
    assert len(faults) == 29
    assert all(number * 60 - 12 <= fault.at_s <= number * 60 for number, fault in enumerate(faults, start=1))
    assert {fault.kind for fault in faults[:10]} == set(SERVER_FAULTS)
    assert {fault.kind for fault in faults[10:]} == {*SERVER_FAULTS, *TRAINER_FAULTS}
    assert "full disk" not in {
        fault.kind for fault in make_schedule(seed=3, **half_an_hour, leave_out=["full disk"])
    }


@pytest.fixture
def run(tiny_task_dir, tmp_path):
    """The files that a run leaves after two steps of 8 tasks with 4 completions each.

    One group was replaced in the second step.
    """
    options = {"tasks_per_step": 8, "positions_per_document": 2}
    data = TokenTaskDataModule(str(tiny_task_dir), **options)
    data.setup("fit")
    steps = [[data.train.task(*pair).task_id for pair in data.stream.next(num)] for num in (8, 9)]
    folder = tmp_path / "run"
    for name in ("rollouts", "checkpoints", "recordings"):
        (folder / name).mkdir(parents=True)
    (folder / "steps.jsonl").write_text(
        "".join(json.dumps({"step": step, "rollout/replaced_groups": step - 1.0}) + "\n" for step in (1, 2))
    )
    (folder / "checkpoints" / "step-000002.ckpt").touch()
    for step, tasks in enumerate(steps, start=1):
        sample = {
            "context": "",
            "truth": [],
            "thought": "",
            "completion": "",
            "prediction": None,
            "reward": 0.0,
            "finish_reason": "stop",
            "policy_version": step - 1,
        }
        lines = [json.dumps({"task_id": task, **sample}) + "\n" for task in tasks[-8:] for _ in range(4)]
        (folder / "rollouts" / f"step-{step:06d}.jsonl").write_text("".join(lines))
        # The first life was killed in its second step.
        for life in range(step, 3) if step == 2 else (1,):
            write_recording(folder, life, step - 1, tasks)
    write_recording(folder, 1, 1, steps[1][:3])
    return folder, TokenTaskDataModule(str(tiny_task_dir), **options)


def write_recording(folder: Path, life: int, version: int, tasks: list[str]) -> None:
    with (folder / "recordings" / f"life-{life:04}-rank-0.jsonl").open("a") as file:
        for task in tasks:
            file.write(
                json.dumps(
                    {
                        "version": version,
                        "task": task,
                        "seed": 1,
                        "temperature": 1.0,
                        "samples": [[[1], [-0.5]]] * 4,
                    }
                )
                + "\n"
            )


def check(run) -> list[str]:
    folder, data = run
    return check_tasks(folder, folder / "recordings", data, group_size=4)


def test_a_step_that_was_begun_twice_counts_once(run):
    assert check(run) == []
    assert check_steps(run[0], 2) == []
    with (run[0] / "recordings" / "life-0001-rank-0.jsonl").open("a") as file:
        file.write('{"version": 1, "ta')  # the process was killed here
    assert check(run) == []
    assert Counter(row["version"] for row in read_recordings(run[0] / "recordings")) == {0: 8, 1: 9}


def test_a_lost_and_a_doubled_task_are_found(run):
    path = run[0] / "recordings" / "life-0002-rank-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    assert "too few" in check(run)[0]
    path.write_text("".join([*lines, lines[0]]))
    assert "4} too many and {} too few" in check(run)[0]
    path.write_text("".join(lines))
    samples = run[0] / "rollouts" / "step-000002.jsonl"
    first, rest = samples.read_text().split("\n", 1)
    samples.write_text(rest)
    assert check(run)[0].startswith("step 2: the trained tasks have")
    assert first


def test_a_step_that_is_missing_twice_or_not_saved_is_found(run):
    assert check_steps(run[0], 3) == [
        "the log has 2 steps up to 2, not each step from 1 to 3 once",
        "the last checkpoint is step-000002.ckpt, not of step 3",
    ]


def test_memory_that_grows_is_found():
    flat = growth_of(
        "flat",
        [(float(second), 300.0 + second % 3 + (100 if second < 50 else 0)) for second in range(0, 600, 2)],
    )
    leak = growth_of("leak", [(float(second), 300.0 + second / 10) for second in range(0, 600, 2)])
    assert flat == Growth(name="flat", life_s=598.0, first_mib=301.0, last_mib=301.0)
    assert (leak.first_mib, leak.last_mib) == pytest.approx((312.6, 353.1), abs=0.3)
    assert check_memory([flat, leak]) == ["leak: 313 to 353 MiB in a life of 598 s"]
    assert growth_of("short", [(0.0, 1.0), (100.0, 500.0)]) is None
