"""What a cluster does to a run, done to real processes: kill -9, SIGTERM, SLURM's signal, Ctrl-C, a full disk."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from real_runs import RealRun, differences, scripted_flags, traces

STEPS = 6


@pytest.fixture(scope="session")
def undisturbed(tiny_model_dir, tiny_task_dir, tmp_path_factory):
    """``undisturbed(flags)`` -> traces of a run that nothing happened to."""
    known = {}

    def run(flags):
        key = str(flags)
        if key not in known:
            whole = RealRun(tmp_path_factory.mktemp("runs") / "whole", flags)
            whole.finish()
            known[key] = traces(whole.folder)
        return known[key]

    return run


@pytest.fixture
def flags(tiny_model_dir, tiny_task_dir):
    return scripted_flags(tiny_model_dir, tiny_task_dir, steps=STEPS)


def check_same(run: RealRun, expected: dict, *, steps: int) -> None:
    found = traces(run.folder)
    assert differences(found, expected) == []
    assert [row["step"] for row in found["steps"]] == list(range(1, steps + 1))  # none lost, none twice
    assert len(set(found["rollouts"].values())) == steps


def test_kill_in_the_middle_of_writing_a_checkpoint(flags, undisturbed, tmp_path):
    run = RealRun(tmp_path / "run", flags)
    run.start()
    assert run.kill_when(lambda: run.step() >= 3 and run.writes_a_checkpoint())
    run.finish()
    check_same(run, undisturbed(flags), steps=STEPS)
    assert run.checkpoints() == ["step-000004.ckpt", "step-000005.ckpt", "step-000006.ckpt"]  # no partial one, keep_every_n_steps=4


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ScriptedEngine", "HFEngine"])
def test_random_kills(engine, tiny_model_dir, tiny_task_dir, undisturbed, tmp_path):
    """10 kills an engine, at random points: after so many more steps and so much of a step, or while a checkpoint is being written."""
    steps, kills, rng = 12, 10, random.Random(engine)
    flags = scripted_flags(tiny_model_dir, tiny_task_dir, steps=steps, engine=engine)
    expected = undisturbed(flags)
    run, points = RealRun(tmp_path / "run", flags), []
    for number in range(kills):
        start, more = run.step(), rng.choice([0, 0, 1, 1, 2])
        target = min(start + more, steps - 1)
        run.start()
        if rng.random() < 0.3:
            where = "in a checkpoint"
            condition = lambda target=target: run.step() >= target and run.writes_a_checkpoint()  # noqa: E731
            after_s = rng.uniform(0, 0.01)
        else:
            where = "in a step"
            condition = lambda target=target: run.step() >= target  # noqa: E731
            after_s = rng.uniform(0, 1.5)
        if not run.kill_when(condition, after_s=after_s):
            points.append(f"{number + 1}: the run was done")
            break
        points.append(f"{number + 1}: {where}, {run.step()} steps logged, checkpoints {run.checkpoints() if (run.folder / 'checkpoints').exists() else []}")
    run.finish() if run.step() < steps or run.status() else None
    print(f"{engine}: {len(points)} kills", *points, sep="\n  ")
    assert sum("done" not in point for point in points) == kills
    check_same(run, expected, steps=steps)
    print("steps.jsonl, rollouts/, validation/, weights, optimizer and place in the data: equal to the undisturbed run, bit for bit")


@pytest.mark.parametrize("moment", ["rollout", "training"])
def test_sigterm_ends_after_the_step_with_a_checkpoint(moment, flags, undisturbed, tmp_path):
    run = RealRun(tmp_path / "run", [*flags, "--checkpoint.every_n_steps", "100"])
    run.start()
    # The log's line is written between training of one step and rollout of the next.
    assert run.wait_for(lambda: run.step() >= 2)
    run.send(signal.SIGTERM)
    assert run.status() == 75, run.text()
    stopped_at = run.step()
    assert stopped_at in (2, 3, 4)
    assert run.checkpoints() == [f"step-{stopped_at:06d}.ckpt"]
    assert f"the run stops after step {stopped_at}: SIGTERM received. Exit status 75; continue with --ckpt_path last" in run.text()
    run.finish()
    check_same(run, undisturbed(flags), steps=STEPS)
