"""The command itself: help, exit status, what is shown of errors."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rpt_lightning.cli import command as cli

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COMMAND = [sys.executable, "-m", "rpt_lightning.cli"]


def test_help_and_unknown_command(rpt):
    status, output = rpt("--help")
    assert status == 0
    assert all(word in output for word in ("fit", "validate", "prepare", "export", "report"))
    status, output = rpt("fti")
    assert status == 1
    assert "'fti' is not a command of rpt" in output


def test_the_installed_module_passes_the_exit_status_on():
    assert subprocess.run([*COMMAND, "--version"], capture_output=True).returncode == 0
    assert subprocess.run([*COMMAND, "fti"], capture_output=True).returncode == 1


def test_print_config_needs_no_model_and_no_network(rpt, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, output = rpt("fit", "--config", CONFIGS / "14b.yaml", "--print_config")
    assert status == 0
    printed = yaml.safe_load(output)
    assert printed["rollout"]["group_size"] == 8
    assert printed["model"]["init_args"]["correction"] == "none"  # a default that the file leaves out


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            pickle.UnpicklingError("invalid load key"),
            "damaged, or is not what its flag asks for: invalid load key",
        ),
        (
            type("SafetensorError", (Exception,), {})("header too large"),
            "make or download the model again): header too large",
        ),
        (type("MisconfigurationException", (Exception,), {})("no such device"), "rpt: error: no such device"),
    ],
)
def test_errors_of_libraries_are_one_message(error, expected, rpt, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(cli, "_run_tool", fail)
    status, output = rpt("prepare")
    assert status == 1
    assert expected in output
    assert "Traceback" not in output


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_run_tool", lambda *args: {}["gone"])
    with pytest.raises(KeyError):
        cli.main(["prepare"])
