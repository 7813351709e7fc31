"""Two nodes on one machine: two `rpt fit --trainer.num_nodes 2`, each a process group of its own, that meet on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rpt_lightning.export import export
from rpt_lightning.training.checkpoint import checkpoint_steps, last_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def command(model, tasks, folder, *strategy, num_nodes):
    return [
        "--config", str(ROOT / "configs/debug.yaml"), *strategy, "--trainer.default_root_dir", str(folder), "--trainer.num_nodes", str(num_nodes),
        "--trainer.devices", "1", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "0", "--model.policy.path", str(model),
        "--data.task_dir", str(tasks), "--data.tasks_per_step", "4",
    ]  # fmt: skip


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def together(commands, environments, timeout=240):
    started = [
        subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"} | more, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT
        )
        for command, more in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(outputs)
    return outputs


def losses(folder):
    return [json.loads(line)["loss/total"] for line in (folder / "steps.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_two_nodes_are_one_run(tiny_model_dir, tiny_task_dir, tmp_path):
    rpt = [sys.executable, "-m", "rpt_lightning.cli", "fit"]
    two = [*rpt, *command(tiny_model_dir, tiny_task_dir, tmp_path / "two", "--config", str(ROOT / "configs/strategy/multi-node.yaml"), num_nodes=2)]
    port = str(free_port())  # where both meet
    nodes = [{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": str(rank), "LOCAL_RANK": "0"} for rank in (0, 1)]
    outputs = together([two, two], nodes)
    assert ["step 2/2" in output for output in outputs] == [True, False]  # said once
    together([[*rpt, *command(tiny_model_dir, tiny_task_dir, tmp_path / "one", num_nodes=1)]], [{}])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3, abs=1e-5)
    export(str(last_checkpoint(tmp_path / "two")), str(tmp_path / "hf"))


@pytest.mark.long
def test_torchrun_script_on_two_nodes(tiny_model_dir, tiny_task_dir, tmp_path):
    given = command(tiny_model_dir, tiny_task_dir, tmp_path / "run", num_nodes=2)
    script = [str(ROOT / "scripts/launch/torchrun.sh"), *given]
    launcher = Path(sys.executable).with_name("torchrun")
    environment = {
        "NUM_NODES": "2",
        "GPUS_PER_NODE": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "TORCHRUN": str(launcher),
        "MAX_RESTARTS": "0",
    }
    together([script, script], [environment, environment])
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [2]
    assert len(losses(tmp_path / "run")) == 2
