"""The launch scripts are parsed by their own languages, and what they pass to `rpt fit` exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "scripts" / "launch"
SHELL = [LAUNCH / "slurm.sbatch", LAUNCH / "torchrun.sh"]


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_parses_them(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True, timeout=60)
    assert not re.search(r"\t", script.read_text())


def arguments(script, folder, given, **environment):
    """What the script would start. Programs that it calls are replaced by one that prints its arguments."""
    for name in ("srun", "torchrun"):
        (folder / name).write_text('#!/bin/bash\nprintf "%s\\n" "$0" "$@"\n')
        (folder / name).chmod(0o755)
    variables = (
        os.environ
        | {"PATH": f"{folder}:{os.environ['PATH']}", "TORCHRUN": str(folder / "torchrun")}
        | environment
    )
    done = subprocess.run(
        [script, *given] if script.suffix == ".sh" else ["bash", script, *given],
        env=variables,
        text=True,
        capture_output=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


FLAGS = ["--trainer.strategy.gather_bf16", "true"]
GIVEN = ["--config", "configs/14b.yaml", "--trainer.default_root_dir", "a folder", *FLAGS]


@pytest.mark.parametrize(
    ("script", "environment"),
    [
        (SHELL[0], {"SLURM_NNODES": "3", "SLURM_NTASKS_PER_NODE": "8(x3)", "SLURM_SUBMIT_DIR": str(ROOT)}),
        (SHELL[1], {"NUM_NODES": "3", "GPUS_PER_NODE": "8"}),
    ],
    ids=["slurm", "torchrun"],
)
def test_they_start_a_run_that_the_command_line_accepts(
    script, environment, tmp_path, offline_policy, monkeypatch
):
    from rpt_lightning.cli.run import make_cli

    started = arguments(script, tmp_path, GIVEN, **environment)
    flags = started[started.index("fit") + 1 :]
    assert flags[-6:] == ["--trainer.num_nodes", "3", "--trainer.devices", "8", "--ckpt_path", "auto"]
    assert "a folder" in flags  # quoted
    # tests/cli/test_runs.py checks the verb's own --ckpt_path. Everything else is parsed here, for one CPU.
    monkeypatch.chdir(ROOT)
    one = [
        "--trainer.num_nodes",
        "1",
        "--trainer.devices",
        "1",
        "--trainer.accelerator",
        "cpu",
        "--trainer.default_root_dir",
        str(tmp_path),
    ]
    cli = make_cli(run=False, args=[*flags[:-6], *one])
    assert type(cli.trainer.strategy).__name__ == "ShardedStrategy"
    assert cli.trainer.strategy.gather_bf16 is True
    assert " ".join(FLAGS) in script.read_text()  # its example, on two nodes


def test_kubernetes_job_is_whole():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    pod = job["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["args"][-len(FLAGS) :] == FLAGS  # words all of them: Kubernetes refuses a bare true
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(environment["NUM_NODES"]) == job["spec"]["completions"]
    assert int(environment["GPUS_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    # The first pod's name under the service, and its port.
    host, port = environment["RDZV_ENDPOINT"].split(":")
    assert host == f"{job['metadata']['name']}-0.{pod['spec']['subdomain']}"
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert (ROOT / container["command"][0]).stat().st_mode & 0o100
    assert all(
        variable in (LAUNCH / "torchrun.sh").read_text() for variable in environment.keys() - {"HF_HOME"}
    )
