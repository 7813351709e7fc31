"""Runs that are asked to end, with real processes.

Launchers and users ask runs of several ranks. One run ends itself because its policy collapsed.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from real_runs import RealRun, scripted_flags

from rpt_lightning.training.callbacks.stop import STATUS_SIGNAL, RunStopped, StopRun

TWO_RANKS = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--checkpoint.every_n_steps", "1000"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize("is_global_zero", [True, False])
def test_no_rank_ends_before_the_job_is_queued_again(is_global_zero, monkeypatch):
    """SLURM may kill the other processes of a job if one of them ends with an error, and 75 is one."""
    events = []
    monkeypatch.setattr(
        "rpt_lightning.training.callbacks.stop._requeue", lambda trainer: events.append("queued")
    )
    trainer = SimpleNamespace(
        max_steps=10, global_step=4, checkpoint_callbacks=[], is_global_zero=is_global_zero, local_rank=0,
        strategy=SimpleNamespace(barrier=lambda name: events.append("barrier")),
        _accelerator_connector=SimpleNamespace(cluster_environment=None),
    )  # fmt: skip
    stop = StopRun()
    stop._request = ("SIGUSR1 received", STATUS_SIGNAL, "")
    with pytest.raises(RunStopped):
        stop._end_if_requested(trainer, requeue=True)
    assert events == (["queued", "barrier"] if is_global_zero else ["barrier"])


@pytest.fixture
def flags(tiny_model_dir, tiny_task_dir):
    return [*scripted_flags(tiny_model_dir, tiny_task_dir, steps=1000), *TWO_RANKS]


def ranks_of(process) -> list[psutil.Process]:
    """The ranks, in order. Lightning's first rank starts the others; torchrun starts all."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    ranks = [
        member
        for member in family
        if "rpt_lightning.cli" in member.cmdline() and "torch.distributed.run" not in member.cmdline()
    ]
    return sorted(ranks, key=lambda member: int(member.environ().get("LOCAL_RANK", 0)))


def check_one_checkpoint(run: RealRun) -> None:
    """There is one checkpoint, of the last step, and the run reports it once."""
    stopped_at = run.step()
    assert run.checkpoints() == [f"step-{stopped_at:06d}.ckpt"]
    assert (
        run.text().count(
            f"the run stops after step {stopped_at}: SIGTERM received. Exit status 75; "
            "continue with --ckpt_path last"
        )
        == 1
    )


@pytest.mark.long
@pytest.mark.parametrize("who", ["first", "second", "all"])
def test_sigterm_to_ranks_that_lightning_started(who, flags, tmp_path):
    run = RealRun(tmp_path / "run", flags)
    process = run.start_command()
    try:
        run.wait_for_text("step 2/1000:", process)
        ranks = ranks_of(process)
        assert len(ranks) == 2
        for rank in {"first": ranks[:1], "second": ranks[1:], "all": ranks}[who]:
            rank.send_signal(signal.SIGTERM)
        assert process.wait(300) == 75, run.text()
        assert psutil.wait_procs(ranks, timeout=30)[1] == []
        check_one_checkpoint(run)
    finally:
        end(run, process)


@pytest.mark.long
def test_sigterm_to_torchrun_ends_the_run(flags, tmp_path):
    run = RealRun(tmp_path / "run", flags)
    process = run.start_command(*TORCHRUN, "--max-restarts", "3", "--module")
    try:
        run.wait_for_text("step 2/1000:", process)
        ranks = ranks_of(process)
        process.terminate()
        process.wait(300)
        assert psutil.wait_procs(ranks, timeout=30)[1] == []
        check_one_checkpoint(run)
        assert run.text().count("step 1/1000:") == 1  # not started again
    finally:
        end(run, process)


@pytest.mark.long
def test_torchrun_starts_a_run_again_whose_rank_was_asked_to_end(flags, tmp_path):
    run = RealRun(tmp_path / "run", [*flags, "--trainer.max_steps", "12"])
    process = run.start_command(*TORCHRUN, "--max-restarts", "1", "--module")
    try:
        run.wait_for_text("step 2/12:", process)
        ranks_of(process)[1].send_signal(signal.SIGTERM)
        assert process.wait(600) == 0, run.text()
        assert run.text().count("SIGTERM received. Exit status 75") == 1
        assert run.text().count("step 1/12:") == 1
        assert run.step() == 12
        assert run.checkpoints()[-1] == "step-000012.ckpt"
    finally:
        end(run, process)


def end(run: RealRun, process) -> None:
    for member in ranks_of(process) if process.poll() is None else []:
        run.end(member.pid)
    run.end(process.pid)


@pytest.mark.long
def test_a_collapsed_policy_stops_the_run_until_something_is_changed(tiny_model_dir, tiny_task_dir, tmp_path):
    """The policy always gives the same answer, so all groups have equal rewards.

    If a launcher starts the run again unchanged, it does not continue.
    """
    (_, config) = scripted_flags(tiny_model_dir, tiny_task_dir, steps=4)
    settings = yaml.safe_load(Path(config).read_text())
    settings["rollout"]["engine"]["init_args"]["completions"] = ["I do not know"]
    settings["rollout"]["objective"]["init_args"]["reward"] = {
        "class_path": "rpt_lightning.objectives.rewards.next_token.PrefixMatchReward"
    }
    settings["trainer"]["val_check_interval"] = 4
    settings["health"] = {"window": 2, "stop": True}
    config = tmp_path / "collapsed.yaml"
    config.write_text(yaml.safe_dump(settings))
    run = RealRun(tmp_path / "run", ["--config", config])
    for starts in (1, 2):
        run.start()
        assert run.status() == 3, run.text()
        assert run.checkpoints() == ["step-000001.ckpt", "step-000002.ckpt"]
        assert (
            run.text().count(
                "the run stops after step 2: health.stop, "
                "100% of the groups have equal rewards (mean of 2 steps"
            )
            == starts
        )
    assert (
        "Exit status 3; look at the last samples; then continue with --ckpt_path last and another setting, "
        "or --health.stop false." in run.text()
    )
    changed = RealRun(tmp_path / "run", ["--config", config, "--health.max_equal_groups", "null"])
    changed.finish()
    assert changed.step() == 4
