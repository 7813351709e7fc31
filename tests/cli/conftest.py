"""The command in this process, and a run that a user made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rpt_lightning import cli

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def rpt(capfd, caplog, monkeypatch):
    """``rpt(...)`` -> (exit status, everything shown), in this process.

    A new process takes seconds to import its libraries.
    """
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(*args):
        capfd.readouterr()
        caplog.clear()
        try:
            status = cli.main([str(arg) for arg in args])
        except SystemExit as end:  # how parsers end
            status = end.code or 0
        shown = capfd.readouterr()
        return (
            status,
            shown.out + shown.err + caplog.text,
        )  # Lightning's log, which is bound to the first test's stderr

    return run


@pytest.fixture(scope="session")
def installed():
    """The console script."""
    return str(Path(sys.executable).with_name("rpt"))


@pytest.fixture(scope="session")
def flags(tiny_model_dir, tiny_task_dir):
    small = ["--data.tasks_per_step", "8", "--data.num_eval_tasks", "8"]
    return [
        "--config",
        CONFIGS / "debug.yaml",
        "--model.policy.path",
        tiny_model_dir,
        "--data.task_dir",
        tiny_task_dir,
        *small,
    ]


@pytest.fixture(scope="session")
def finished_run(flags, installed, tmp_path_factory):
    """A run in a process of its own, exactly as a user runs it."""
    run_dir = tmp_path_factory.mktemp("runs") / "debug"
    command = [installed, "fit", *map(str, flags), "--trainer.default_root_dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir, done.stdout + done.stderr


@pytest.fixture
def run_copy(finished_run, tmp_path):
    return shutil.copytree(finished_run[0], tmp_path / "copy")
