"""A cluster's faults on real processes: kill -9, SIGTERM, SLURM's signal, Ctrl-C, a full disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from real_runs import RealRun, differences, scripted_flags, traces

from rpt_lightning.training.callbacks.stop import STATUS_SIGNAL

STEPS = 6


@pytest.fixture(scope="session")
def undisturbed(tiny_model_dir, tiny_task_dir, tmp_path_factory):
    """``undisturbed(flags)`` -> traces of a run without any disturbance."""
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
    assert (
        sum(row["optim/grad_norm"] > 0 for row in found["steps"]) > steps // 2
    )  # there was something to lose


def test_kill_in_the_middle_of_writing_a_checkpoint(flags, undisturbed, tmp_path):
    run = RealRun(tmp_path / "run", flags)
    run.start()
    assert run.kill_when(lambda: run.step() >= 3 and run.writes_a_checkpoint())
    run.finish()
    check_same(run, undisturbed(flags), steps=STEPS)
    assert run.checkpoints() == [
        "step-000004.ckpt",
        "step-000005.ckpt",
        "step-000006.ckpt",
    ]  # no partial one, keep_every_n_steps=4


def test_kill_and_stop_between_a_checkpoint_and_its_validation(flags, undisturbed, tmp_path):
    hold, config = tmp_path / "hold", tmp_path / "held.yaml"
    hold.touch()
    callback = {"class_path": "real_runs.HeldValidation", "init_args": {"file": str(hold)}}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    run = RealRun(tmp_path / "run", [*flags, "--config", config])
    run.start()
    assert run.kill_when(lambda: (run.folder / "checkpoints" / "step-000002.ckpt").exists())
    assert not (run.folder / "validation" / "step-000002.jsonl").exists()
    begun = hold.with_suffix(".begun")
    begun.unlink(missing_ok=True)
    # The validation is made up for before the first step. A signal in it waits for the end of that step.
    run.start()
    assert run.wait_for(begun.exists)
    run.send(signal.SIGTERM)
    hold.unlink()
    assert run.status() == STATUS_SIGNAL, run.text()
    assert run.step() == 3
    run.finish()
    check_same(run, undisturbed(flags), steps=STEPS)


def test_kill_in_the_last_validation(flags, undisturbed, tmp_path):
    """No further step will make up for it, and the launcher only starts the same command again."""
    hold, config = tmp_path / "hold", tmp_path / "held.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "callbacks": [
                        {"class_path": "real_runs.HeldValidation", "init_args": {"file": str(hold)}}
                    ]
                }
            }
        )
    )
    run = RealRun(tmp_path / "run", [*flags, "--config", config])
    run.start()
    assert run.wait_for(lambda: run.step() >= STEPS - 1)
    hold.touch()
    assert run.kill_when(lambda: (run.folder / "checkpoints" / f"step-{STEPS:06d}.ckpt").exists())
    assert not (run.folder / "validation" / f"step-{STEPS:06d}.jsonl").exists()
    hold.unlink()
    run.finish()
    assert "complete except for the validation at its last step" in run.text()
    # The answers are the same. The record only adds that they come from the checkpoint.
    assert differences(traces(run.folder), undisturbed(flags)) == [f"/validation/step-{STEPS:06d}.json"]
    run.finish()
    assert "nothing is left to do" in run.text()


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ScriptedEngine", "HFEngine"])
def test_random_kills(engine, tiny_model_dir, tiny_task_dir, undisturbed, tmp_path):
    """10 kills for each engine, at random points.

    They come some steps and part of a step later, or while a checkpoint is being written.
    """
    steps, kills, rng = 24, 10, random.Random(engine)
    flags = scripted_flags(tiny_model_dir, tiny_task_dir, steps=steps, engine=engine)
    expected = undisturbed(flags)
    run, points = RealRun(tmp_path / "run", flags), []
    for number in range(kills):
        start, more = run.step(), rng.choice([0, 1, 1, 2])
        target = min(start + more, steps - 1)
        run.start()
        if rng.random() < 0.3:
            where = "in a checkpoint"
            condition = lambda target=target: run.step() >= target and run.writes_a_checkpoint()  # noqa: E731
            after_s = rng.uniform(0, 0.01)
        else:
            where = "in a step"
            condition = lambda target=target: run.step() >= target  # noqa: E731
            after_s = rng.uniform(0, 0.4)
        if not run.kill_when(condition, after_s=after_s):
            points.append(f"{number + 1}: the run was done")
            break
        points.append(
            f"{number + 1}: {where}, {run.step()} steps logged, checkpoints "
            f"{run.checkpoints() if (run.folder / 'checkpoints').exists() else []}"
        )
    run.finish() if run.step() < steps or run.status() else None
    print(f"{engine}: {len(points)} kills", *points, sep="\n  ")
    assert sum("done" not in point for point in points) == kills
    check_same(run, expected, steps=steps)
    print(
        "steps.jsonl, rollouts/, validation/, weights, optimizer and place in the data: "
        "equal to the undisturbed run, bit for bit"
    )


def trained_tasks(found: dict) -> dict[str, list[str]]:
    """The tasks of each step, in order."""
    return {
        name: list(dict.fromkeys(json.loads(line)["task_id"] for line in text.splitlines()))
        for name, text in found["rollouts"].items()
    }


@pytest.mark.long
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_no_task_is_lost_or_doubled_with_rollouts_ahead(signum, flags, undisturbed, tmp_path):
    """The run is ended three times while the next step's rollouts are generated or wait.

    The same tasks are trained at the same steps, on rollouts of other weights.
    """
    flags = [
        *flags,
        "--rollout.max_staleness",
        "1",
        "--model.correction",
        "truncate",
        "--rollout.dynamic_sampling.from_step",
        "null",
    ]
    expected = undisturbed(flags)
    run = RealRun(tmp_path / "run", flags)
    for step in (1, 3, 4):
        run.start()
        assert run.wait_for(lambda step=step: run.step() >= step)
        run.send(signum)
        assert run.status() == (75 if signum == signal.SIGTERM else -9), run.text()
    run.finish()
    found = traces(run.folder)
    assert trained_tasks(found) == trained_tasks(expected)
    assert len({task for tasks in trained_tasks(found).values() for task in tasks}) == 4 * STEPS
    assert [row["step"] for row in found["steps"]] == list(range(1, STEPS + 1))
    assert found["place in the data"] == expected["place in the data"]
    assert {int(state["step"]) for state in found["optimizer"][0]["state"].values()} == {STEPS}


def test_sigterm_ends_after_the_step_with_a_checkpoint(flags, undisturbed, tmp_path):
    run = RealRun(tmp_path / "run", [*flags, "--checkpoint.every_n_steps", "100"])
    run.start()
    assert run.wait_for(lambda: run.step() >= 2)  # the next thing is a rollout
    run.send(signal.SIGTERM)
    assert run.status() == 75, run.text()
    stopped_at = run.step()
    assert stopped_at in (2, 3, 4)
    assert run.checkpoints() == [f"step-{stopped_at:06d}.ckpt"]
    assert (
        f"the run stops after step {stopped_at}: SIGTERM received. Exit status 75; "
        "continue with --ckpt_path last" in run.text()
    )
    run.finish()
    check_same(run, undisturbed(flags), steps=STEPS)


def test_slurm_requeues_the_job(flags, tmp_path):
    calls, scontrol = tmp_path / "calls", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nls {tmp_path}/run/checkpoints >> {calls}\n')
    scontrol.chmod(0o755)
    run = RealRun(
        tmp_path / "run", [*flags, "--checkpoint.every_n_steps", "100", "--stop.requeue_signal", "SIGUSR2"]
    )
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }
    run.start(PATH=f"{scontrol.parent}:{os.environ['PATH']}", SLURM_JOB_NAME="rpt", **job)
    assert run.wait_for(lambda: run.step() >= 1)
    run.send(signal.SIGUSR2)
    run.send(signal.SIGTERM)  # SLURM sends it as well
    assert run.status() == 75, run.text()
    assert calls.read_text().splitlines() == [
        "requeue 4711",
        f"step-{run.step():06d}.ckpt",
    ]  # requested once, when the checkpoint was there
    assert not list(
        run.folder.glob("hpc_ckpt*")
    )  # Lightning's own handler did not save in the middle of a step
    assert "SLURM job 4711 is queued again" in run.text()


def test_ctrl_c_says_how_to_go_on(flags, tmp_path):
    run = RealRun(tmp_path / "run", flags)
    run.start()
    assert run.wait_for(lambda: run.step() >= 2)
    run.send(signal.SIGINT)
    assert run.status() == 1
    assert "The last complete checkpoint is" in run.text()
    assert "continue with --ckpt_path last" in run.text()


@pytest.mark.parametrize("small_disk", [45], indirect=True)
def test_a_full_disk(flags, undisturbed, small_disk):
    """There is room for two checkpoints of 13 MB but not for a third.

    The file that fills the disk is removed before the run is started again.
    """
    filler = small_disk / "other people's data"
    filler.write_bytes(bytes(15_000_000))
    run = RealRun(small_disk / "run", flags)
    run.log = small_disk.parent / "run.log"
    run.start()
    assert run.status() == 1, run.text()
    written = run.checkpoints()[-1]
    assert not [name for name in run.checkpoints() if "partial" in name]
    assert f"rpt: error: cannot write the checkpoint of step {len(run.checkpoints()) + 1}" in run.text()
    assert f"{written}: continue with --ckpt_path last" in run.text()
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    run.finish()
    check_same(run, undisturbed(flags), steps=STEPS)


@pytest.mark.parametrize("small_disk", [1], indirect=True)
def test_a_disk_that_is_full_at_the_start(flags, small_disk):
    filler = small_disk / "other people's data"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(2_000_000))
    run = RealRun(small_disk / "run", flags)
    run.log = small_disk.parent / "run.log"
    run.start()
    assert run.status() == 1, run.text()
    error = [line for line in run.text().splitlines() if line.startswith("rpt: error:")]
    assert len(error) == 1
    assert f"trainer.default_root_dir={run.folder}: the run cannot write there" in error[0]
    assert "Make room or put the folder back" in error[0]
    assert "Traceback" not in run.text()


@pytest.mark.parametrize("what", ["deleted", "moved"])
def test_a_run_folder_that_goes_away(what, flags, tmp_path):
    run = RealRun(tmp_path / "run", flags)
    run.log = tmp_path / "run.log"
    run.start()
    assert run.wait_for(lambda: run.step() >= 2)
    if what == "moved":
        run.folder.rename(tmp_path / "moved")
    else:
        shutil.rmtree(run.folder, ignore_errors=True)
    assert run.status() == 1, run.text()
    error = [line for line in run.text().splitlines() if line.startswith("rpt: error:")]
    assert len(error) == 1, run.text()
    assert f"trainer.default_root_dir={run.folder}: the run cannot write there" in error[0]
    assert "Traceback" not in run.text()
    if what == "moved":  # nothing that was written is lost
        assert list((tmp_path / "moved" / "checkpoints").glob("step-*.ckpt"))


def test_a_damaged_checkpoint_is_passed_over_and_said(flags, undisturbed, tmp_path):
    run = RealRun(tmp_path / "run", flags)
    run.start()
    assert run.kill_when(
        lambda: "step-000003.ckpt" in (run.checkpoints() if (run.folder / "checkpoints").exists() else [])
    )
    newest = run.folder / "checkpoints" / run.checkpoints()[-1].removesuffix(".partial")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(content)
    run.finish()
    assert f"{newest} is damaged: its part" in run.text()
    assert "The run resumes from the one before" in run.text()
    assert f"{newest.name}.abandoned" in run.checkpoints()
    check_same(run, undisturbed(flags), steps=STEPS)


@pytest.mark.long
def test_an_error_of_another_rank_is_the_errors_text_and_status_1(flags, tmp_path):
    """Not 137: Lightning's launcher would kill the first rank before it learned the reason."""
    launch = [
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--trainer.callbacks+=real_runs.FailsAtStepTwo",
        "--ranks.limit_s",
        "10",
    ]
    run = RealRun(tmp_path / "run", [*flags, *launch])
    assert run.start_command().wait(timeout=180) == 1, run.text()
    assert (
        "ended with ValueError: a shard is damaged. Rank 0 ends too; continue with --ckpt_path last"
        in run.text()
    )
    kept, end = run.folder / "error-1.txt", time.monotonic() + 30  # the other rank ends after the first
    while not (kept.exists() and "a shard is damaged" in kept.read_text()):
        assert time.monotonic() < end, run.text()
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_hangs_ends_the_other(fault, victim, flags, tmp_path):
    """There are two gloo ranks. The other one must end within a minute and name the lost one.

    A stopped process keeps its connections open and answers nothing.
    """
    launch = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "500"]
    run = RealRun(tmp_path / "run", [*flags, *launch])
    process = run.start_command()
    try:
        run.wait_for_text("step 2/500:", process)
        (child,) = [
            int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        killed, other = (process.pid, child) if victim == 0 else (child, process.pid)
        os.kill(killed, fault)
        assert run.ends(other, within_s=60, process=process), run.text()
        # Either the watch ends it, or Lightning's launcher does if it started the dead rank.
        assert (
            f"rpt: error: rank {victim}" in run.text()
            or f"[rank: {victim}] Child process with PID {killed} terminated with code -9" in run.text()
        )
        assert "Is the disk full?" not in run.text()
    finally:
        for pid in (process.pid, child):
            run.end(pid)
