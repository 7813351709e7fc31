from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_imports_go_one_way():
    done = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["types", "cli", "evaluation.summary", "evaluation.report.report_command", "export"]
)
def test_heavy_libraries_stay_in_their_adapters(name: str):
    """Only their users pay for importing them and for their effects.

    lightning takes seconds to import, and vllm takes over a process's threads.
    """
    heavy = {"vllm", "litdata", "lightning", "datasets"}
    done = run(
        sys.executable,
        "-c",
        f"import sys, rpt_lightning.{name}; print(*sorted({heavy} & sys.modules.keys()))",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
