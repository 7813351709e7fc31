"""Two nodes on one machine: two process groups of `rpt fit --trainer.num_nodes 2` that meet on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rpt_lightning.export import export
from rpt_lightning.training.checkpoint.callback import checkpoint_steps, last_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def command(model, tasks, folder, *strategy, num_nodes):
    return [
        "--config", str(ROOT / "configs/debug.yaml"), *strategy, "--trainer.default_root_dir", str(folder),
        "--trainer.num_nodes", str(num_nodes), "--trainer.devices", "1", "--trainer.max_steps", "2",
        "--trainer.limit_val_batches", "0", "--model.policy.path", str(model), "--data.task_dir", str(tasks),
        "--data.tasks_per_step", "4",
    ]  # fmt: skip


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def meeting():
    """Return the environments of the two nodes."""
    port = str(free_port())
    return [
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
        for rank in (0, 1)
    ]


def together(commands, environments, timeout=240, statuses=None):
    started = [
        subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | more,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
        for command, more in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == (statuses or [0] * len(started)), "\n".join(outputs)
    return outputs


def losses(folder):
    return [json.loads(line)["loss/total"] for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_two_nodes_are_one_run(tiny_model_dir, tiny_task_dir, tmp_path):
    rpt = [sys.executable, "-m", "rpt_lightning.cli", "fit"]
    two = [
        *rpt,
        *command(
            tiny_model_dir,
            tiny_task_dir,
            tmp_path / "two",
            "--config",
            str(ROOT / "configs/strategy/multi-node.yaml"),
            num_nodes=2,
        ),
    ]
    outputs = together([two, two], meeting())
    assert ["step 2/2" in output for output in outputs] == [True, False]  # only one node reports it
    together([[*rpt, *command(tiny_model_dir, tiny_task_dir, tmp_path / "one", num_nodes=1)]], [{}])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3, abs=1e-5)
    export(str(last_checkpoint(tmp_path / "two")), str(tmp_path / "hf"))


@pytest.mark.long
def test_nodes_that_see_different_checkpoints_do_not_start(tiny_model_dir, tiny_task_dir, tmp_path):
    """Each node has its own folder here. A network file system may also show one node a checkpoint late."""
    rpt = [sys.executable, "-m", "rpt_lightning.cli", "fit"]
    seen, unseen = tmp_path / "seen", tmp_path / "unseen"
    together([[*rpt, *command(tiny_model_dir, tiny_task_dir, seen, num_nodes=1)]], [{}])
    strategy = ["--config", str(ROOT / "configs/strategy/multi-node.yaml"), "--ckpt_path", "auto"]
    two = [
        [
            *rpt,
            *command(tiny_model_dir, tiny_task_dir, folder, *strategy, num_nodes=2),
            "--trainer.max_steps",
            "3",
        ]
        for folder in (seen, unseen)
    ]
    outputs = together(two, meeting(), statuses=[1, 1])
    wanted = "the ranks would start from different checkpoints of"
    assert all(
        wanted in output and "(step-000002.ckpt: rank 0; none: rank 1)" in output for output in outputs
    ), outputs
    assert checkpoint_steps(seen / "checkpoints") == [2]


@pytest.fixture
def torchrun():
    """Start scripts/launch/torchrun.sh on both nodes."""
    environment = {
        "NUM_NODES": "2",
        "GPUS_PER_NODE": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "TORCHRUN": str(Path(sys.executable).with_name("torchrun")),
    }

    def start(flags, **more):
        script = [str(ROOT / "scripts/launch/torchrun.sh"), *flags]
        return together([script, script], [environment | more] * 2)

    return start


@pytest.mark.long
def test_torchrun_script_on_two_nodes(torchrun, tiny_model_dir, tiny_task_dir, tmp_path):
    torchrun(command(tiny_model_dir, tiny_task_dir, tmp_path / "run", num_nodes=2), MAX_RESTARTS="0")
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [2]
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.long
def test_one_rank_killed_is_one_restart_of_both_nodes(torchrun, tiny_model_dir, tiny_task_dir, tmp_path):
    """A restart must not make the watches think that the other node's ranks are dead.

    torchrun counts restarts on each node separately, and its store survives them.
    """
    flags = command(tiny_model_dir, tiny_task_dir, tmp_path / "run", num_nodes=2)
    flags += ["--checkpoint.every_n_steps", "1", "--trainer.max_steps", "14", "--ranks.limit_s", "5"]
    flags += [
        "--trainer.callbacks+=real_runs.KilledOnce",
        "--trainer.callbacks.file",
        str(tmp_path / "killed"),
    ]
    modules = os.pathsep.join([str(ROOT / "tests" / "training"), os.environ.get("PYTHONPATH", "")])
    outputs = torchrun(flags, MAX_RESTARTS="1", PYTHONPATH=modules)
    assert (tmp_path / "killed").exists()
    assert len(losses(tmp_path / "run")) == 14
    # At most the killed one is reported.
    assert sum(output.count("has given no sign of life") for output in outputs) <= 1
