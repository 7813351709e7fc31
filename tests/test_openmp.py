"""The setting of waiting threads before torch is imported, and its single message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rpt_lightning.cli.openmp import CHOICES, VARIABLE, computes_on_cpu, is_to_be_set, let_threads_sleep

ROOT = Path(__file__).resolve().parents[1]
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
# The command with its work replaced. A child says what it inherited, and whether it would print anything
# itself.
COMMAND = """
import subprocess, sys
from rpt_lightning.cli import command as cli

CHILD = (
    "import os; from rpt_lightning.cli import command as cli; "
    "cli._run_tool = lambda *args: print(os.environ.get('OMP_WAIT_POLICY')); cli.main(['prepare'])"
)
cli._run_tool = lambda *args: subprocess.run([sys.executable, "-c", CHILD], check=True)
sys.exit(cli.main(sys.argv[1:]))
"""


def environment(**variables: str) -> dict[str, str]:
    """The environment of a user who has set nothing, on a machine that computes on its CPU."""
    # vLLM on a CPU preloads OpenMP's runtime into later processes. An earlier test may have started it in
    # this one.
    set_here = ("OMP_", "GOMP_", "KMP_", "LD_PRELOAD")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(set_here) and name not in RANKS
    }
    return inherited | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")} | variables


def run(code: str, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is set elsewhere")


def test_where_nothing_is_set_threads_sleep_and_it_is_said_once():
    done = run(COMMAND, "prepare")
    assert done.stdout == "PASSIVE\n"  # the child's
    (line,) = done.stderr.splitlines()
    assert line.startswith("rpt: OMP_WAIT_POLICY=PASSIVE was set")


@pytest.mark.parametrize("name", CHOICES)
def test_a_users_own_choice_stays_and_nothing_is_said(name: str):
    own = {
        "OMP_WAIT_POLICY": "ACTIVE",
        "GOMP_SPINCOUNT": "1000",
        "KMP_BLOCKTIME": "200",
        "KMP_LIBRARY": "turnaround",
    }[name]
    done = run(COMMAND, "prepare", **{name: own})
    assert done.stdout == ("ACTIVE\n" if name == VARIABLE else "None\n")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("num_threads", "policy"),
    [("1", "None"), (" 1 ", "None"), ("2", "PASSIVE"), ("16", "PASSIVE"), ("4,1", "PASSIVE")],
)
def test_one_thread_waits_for_none(num_threads: str, policy: str):
    assert is_to_be_set({"OMP_NUM_THREADS": num_threads}, computes_on_cpu=True) is (policy == "PASSIVE")


def test_with_a_gpu_nothing_is_set(tmp_path: Path):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = run(COMMAND, "prepare", PATH=path, CUDA_VISIBLE_DEVICES="0")
    assert done.stdout == "None\n"
    assert done.stderr == ""
    assert not computes_on_cpu({"PATH": path})
    for hidden in ("", "-1"):
        assert computes_on_cpu({"PATH": path, "CUDA_VISIBLE_DEVICES": hidden})
    assert not is_to_be_set({}, computes_on_cpu=False)


@pytest.mark.parametrize(
    ("rank", "says"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "3", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "1"}, False),
    ],
)
def test_of_several_ranks_the_first_says_it_and_all_have_it(
    rank: dict[str, str], says: bool, monkeypatch, capsys
):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    variables = {"CUDA_VISIBLE_DEVICES": "", **rank}
    let_threads_sleep(variables)
    assert variables[VARIABLE] == "PASSIVE"
    assert len(capsys.readouterr().err.splitlines()) == says


def test_after_torch_it_would_be_too_late(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", sys)
    variables = {"CUDA_VISIBLE_DEVICES": ""}
    let_threads_sleep(variables)
    assert VARIABLE not in variables
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "args",
    [
        ["compare"],
        ["prepare", "--help"],
        ["prepare", "--print_config"],
        ["prepare", "--print_config=comments"],
    ],
)
def test_commands_that_only_read_or_show_say_nothing(args: list[str]):
    assert (
        run(COMMAND.replace("CHILD], check", "CHILD], stderr=subprocess.DEVNULL, check"), *args).stderr == ""
    )


def test_the_runtime_that_torch_loads_obeys():
    """GNU's runtime shows its settings when it is loaded. Spinning is then off."""
    code = (
        "import sys; from rpt_lightning.cli import command as cli; "
        "cli._run_tool = lambda *args: __import__('torch'); sys.exit(cli.main(['prepare']))"
    )
    shown = run(code, OMP_DISPLAY_ENV="VERBOSE").stderr
    if "GOMP_SPINCOUNT =" not in shown:
        pytest.skip("torch's OpenMP is not GNU's")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown
    assert "GOMP_SPINCOUNT = '0'" in shown
